"""What an encoder-decoder wrote, and where its decoder looked to write each token: at the source, or at its own start."""

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.figures.generation import written_targets
from lens.runs.sections import Section
from lens.stats.verdicts import mean_told
from lens.traces.trace import AttentionTrace
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject

_SAID = {
    "cross": (
        "entropy",
        "entropy of attention on the source, nats",
        "How widely heads look at the source, token by token",
    ),
    "decoder": (
        "start",
        "attention on the first token, mean over heads",
        "How much heads look at the decoder's first token, token by token",
    ),
}
"""Part -> the number of a step, its axis, the title of its figure."""


def generation(subject: Subject) -> Section:
    """Each target that was written, token by token, with a number of the row that wrote it beside uniform attention.

    Raises:
        LensError: every target ended before a token of it.
    """
    part = subject.model.chosen
    column, axis, title = _SAID[part]
    every = {name: subject.run.trace(name) for name in subject.run.traces}
    traces = {name: trace for name, trace in every.items() if _written(trace)}
    if not traces:
        raise LensError(f"{subject.model.name} ended every target before it wrote a token of it")
    empty = [name for name in every if name not in traces]
    steps = pd.concat(
        [_steps(name, trace, part) for name, trace in traces.items()], ignore_index=True
    )
    titles = dict(zip(subject.run.prompts["prompt_id"], subject.run.prompts["title"], strict=True))
    texts = pd.DataFrame(
        {
            "prompt_id": name,
            "source": titles[name],
            "written": "".join(_written(trace)),
            "tokens": len(_written(trace)),
        }
        for name, trace in traces.items()
    )
    means = steps.groupby("prompt_id")[[column, f"{column}_uniform"]].mean().to_numpy()
    said = mean_told(means[:, 0], subject.seed, ".2f")
    asked = subject.settings
    return Section(
        name="generation",
        title="What the decoder looks at while it writes",
        summary=(
            *(
                f"{row['prompt_id']}: for {row['source']} it wrote {row['written']!r}."
                for row in texts.to_dict("records")
            ),
            f"{axis[0].upper()}{axis[1:]}: {said}, of uniform attention {means[:, 1].mean():.2f}.",
        ),
        limits=(
            "A target that the model wrote itself is likelier to it than one of people: heads may do other things on those.",
            "The trace is of one pass over the target that was written, which sees at each token what writing it saw.",
            *((f"For {', '.join(empty)} the model wrote nothing but the end.",) if empty else ()),
            *(("One target has no interval.",) if len(traces) == 1 else ()),
        ),
        columns=defined((texts, steps), _COLUMNS),
        configuration={
            "new": asked.new,
            "temperature": asked.temperature,
            "part": part,
            "seed": subject.seed,
        },
        tables={"texts": texts, "steps": steps},
        figures={"steps": written_targets(steps, column, axis, title)},
    )


def _written(trace: AttentionTrace) -> list[str]:
    """Tokens after the decoder's first one (its start), which row 0, 1, ... wrote."""
    return (trace.query_tokens if trace.cross else trace.tokens)[1:]


def _steps(name: str, trace: AttentionTrace, part: str) -> pd.DataFrame:
    """A row for each token that was written, with the mean over layers and heads of a number of the row that wrote it."""
    tokens, column = _written(trace), _SAID[part][0]
    place = np.arange(1, len(tokens) + 1)
    own = trace.dataset["entropy" if part == "cross" else "first_mass"].values[:, :, :-1]
    even = np.full(len(tokens), np.log(trace.length)) if part == "cross" else 1 / place
    return pd.DataFrame(
        {
            "prompt_id": name,
            "step": place,
            "token": tokens,
            column: own.mean((0, 1)),
            f"{column}_uniform": even,
        }
    )


_COLUMNS = {
    "prompt_id": "Source that a target was written for.",
    "source": "Title of the source.",
    "written": "What the model wrote, with tokens that it must begin with.",
    "tokens": "Tokens of it.",
    "step": "Which of the tokens that were written, from 1.",
    "token": "The token, which the decoder writes in this row of its attention; it reads the token before it there.",
    "entropy": "Entropy of the row over keys of the source, nats, mean over layers and heads.",
    "entropy_uniform": "That of attention that is the same on every key.",
    "start": "Attention on the decoder's first token, mean over layers and heads.",
    "start_uniform": "That of attention that is the same on every key that is seen.",
}
