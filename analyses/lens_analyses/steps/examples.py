"""Top activating examples: the windows of a corpus on which each head attends most."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from lens import reading
from lens.common.results import ends
from lens.figures.columns import column_grid
from lens.models.vocabulary import around, windows
from lens.reading.top_examples import WORDS
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import WINDOW, Subject, corpus_of


def examples(subject: Subject) -> Section:
    """Each head's best windows of the corpus, and the pair of tokens in each."""
    settings = subject.settings
    found = reading.examples(
        subject.model,
        _corpus(subject),
        n=settings.top,
        chance=settings.chance,
        seed=subject.seed,
        progress=subject.progress,
    )
    heads = found.table()
    tables = {"heads": heads, "examples": found.examples(), "strips": found.strips()}
    return Section(
        name="examples",
        title="Where each head attends most: top examples of a corpus",
        summary=found.findings(),
        limits=(
            f"{found.prompts} windows of {_length(subject)} tokens were looked through: a head may do more on other texts.",
            "An example is the strongest pair of one window, whatever the rest of the window looks like.",
            "Strong attention is no effect: what a pair writes is measured by its size, not by what it changes.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"windows": found.prompts, "length": _length(subject), "seed": subject.seed},
        tables=tables,
        figures={
            by: column_grid(
                heads[(heads["by"] == by).to_numpy()], "typical", labels={"typical": WORDS[by]}
            )
            for by in found.found
        },
        headlines=tuple(_headlines(heads)),
    )


def _corpus(subject: Subject) -> Iterator[list[int]]:
    """Windows of its texts, one after the other."""
    left, pair, length = subject.settings.n, around(subject.model), _length(subject)
    for source in corpus_of(subject.config):
        ids = subject.model.encode(source.text)
        for window in windows(ids, length, pair) or [ids[:length]]:
            if left:
                left -= 1
                yield window


def _length(subject: Subject) -> int:
    context = subject.model.info.context or WINDOW
    return subject.settings.length or min(WINDOW, context)


def _headlines(heads: pd.DataFrame) -> Iterator[Headline]:
    """By each measure the head whose strongest pair is most above what random weights have."""
    for by, rows in heads.dropna(subset=["random_weights"]).groupby("by", sort=False):
        top: dict[Any, Any] = rows.loc[[rows["typical"].idxmax()]].to_dict("records")[0]
        interval = ends(top["typical_low"], top["typical_high"], ".2f")
        yield Headline(
            f"{top['name']} looks hardest by {WORDS[str(by)]}: its strongest pair of a window has {top['typical']:.2f}"
            f"{interval} on average, with random weights at most {top['random_weights']:.2f}; the best is {top['query_token']!r} to "
            f"{top['key_token']!r}.",
            *(
                float(top[name])
                for name in ("typical", "typical_low", "typical_high", "random_weights")
            ),
            against="random weights",
            figure=str(by),
            many=len(rows),
            units=int(top.get("n", 0)),
        )


_COLUMNS = {
    "name": "Layer and head.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "by": "Measure: attention; sink_excluded, attention without the first key and rescaled; written, attention times the size of what the key's value writes to the residual stream.",
    "best": "Mean over the examples that are kept.",
    "typical": "Strongest pair of a window, mean over windows: the typical score.",
    "random_weights": "The highest typical score of any head of the same architecture with random weights.",
    "n": "Windows that the typical score is over.",
    "rank": "Of the example, from 1.",
    "value": "Of the pair, by the measure.",
    "uniform": "The same of a row that looks at all keys that it sees alike.",
    "prompt": "Window of the corpus, from 0.",
    "query": "Position of the query.",
    "key": "Position of the key.",
    "query_token": "Token of the query; of the strongest example in the table heads.",
    "key_token": "Token of the key.",
    "place": "Position of a token near the pair.",
    "token": "What stands there.",
    "weight": "Of the query's row there, by the measure; empty behind it.",
}
