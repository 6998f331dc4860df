"""Why heads attend where they do: logits taken apart, parts taken out, singular components."""

from collections.abc import Iterator

import pandas as pd

import lens
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Sentence, ends, of_kind
from lens.reading.explanations import Explanation
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.config.listed import listed
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_highest
from lens_analyses.steps.subject import Subject

_HEADS = 3
_CELLS = 15  # of each head, in the table
_PROMPTS, _DRAWS = 6, 5  # of the section on faithfulness
_LONGEST, _BLOCK = (
    512,
    64,
)  # tokens of a prompt that are judged one by one, and together in longer ones
_PARTS = 6  # of each head that are taken out
_TRIALS, _MASKED, _RANDOM = 4, (1, 3), 2  # of the section on retrieval
_PAIRS, _SIDE = (
    10,
    10,
)  # pairs of the first prompt that are shown one by one, and parts of each side
_METRIC = {"induction": "induction", "duplicate": "duplicate_token", "previous": "previous_token"}


def explain(subject: Subject) -> Section:
    """What wrote the queries and the keys of each chosen head on pairs of a kind."""
    sides, cells, components, pairs, products, figures = [], [], [], [], [], {}
    said: list[Sentence] = []
    for head in _heads(subject):
        found = lens.reading.explain_pairs(
            subject.model, subject.task.prompts, head, _pairs(subject),
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip
        said += found.findings()
        for side in ("key", "query"):
            table = found.side(side).drop(columns="group")
            sides.append(_named(head, table.assign(side=side)))
        cells.append(_named(head, found.table(top=_CELLS).drop(columns="group")))
        carried = lens.reading.components(
            subject.model, subject.task.prompts, head, _pairs(subject),
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip
        said += of_kind(carried.findings(), "participation")
        components.append(_named(head, carried.table()))
        for one in _of_pairs(subject, head):
            pairs.append(_named(head, _pair(one)))
            products.append(_named(head, _products(one)))
        figures |= {f"parts_{_key(head)}": found.plot(), f"components_{_key(head)}": carried.plot()}
    tables = {
        "sides": pd.concat(sides, ignore_index=True),
        "cells": pd.concat(cells, ignore_index=True),
        "components": pd.concat(components, ignore_index=True),
    }
    if pairs:
        tables["pairs"] = pd.concat(pairs, ignore_index=True)
        tables["products"] = pd.concat(products, ignore_index=True)
    return Section(
        name="explain",
        title="Why heads attend there: what wrote their queries and keys",
        summary=tuple(said),
        limits=(
            "Norms are held at the sizes that they have; the section on parts taken out says what the model does without them.",
            "Parts are what heads and MLPs write, not features. Shares above 100 % stand beside negative ones.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration=_configuration(subject),
        tables=tables,
        figures=figures,
        headlines=tuple(_headlines(tables["sides"])),
    )


def removal(subject: Subject) -> Section:
    """The attention without each of the largest parts of the keys, predicted and measured."""
    tables, figures = [], {}
    said: list[Sentence] = []
    largest = subject.run.section("explain").tables["sides"]
    for head in _heads(subject):
        own = largest[(largest["name"] == str(head)) & (largest["side"] == "key")]
        written = [part for part in own["part"] if part not in ("key bias", "norm bias")]
        found = lens.reading.removal(
            subject.model, subject.task.prompts, head, _pairs(subject), parts=written[:_PARTS],
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip
        said += found.findings()
        tables.append(_named(head, found.table()))
        figures[f"removal_{_key(head)}"] = found.plot()
    table = pd.concat(tables, ignore_index=True)
    return Section(
        name="removal",
        title="The same heads without a part of their keys: predicted, and what the model does",
        headlines=tuple(_without(table)),
        summary=tuple(said),
        limits=(
            "A part is taken out of what one head's keys read; what it does elsewhere stays as it is.",
            f"Of each head the {_PARTS} parts with the largest contrast are taken out.",
        ),
        columns=defined([table], _COLUMNS),
        configuration=_configuration(subject),
        tables={"removal": table},
        figures=figures,
    )


def _without(table: pd.DataFrame) -> Iterator[Headline]:
    """Of each head the part without which its attention falls most, beside the attention with all parts."""
    for name, own in table.groupby("name", sort=False):
        row = own.sort_values("measured").to_dict("records")[0]
        interval = ends(row["measured_low"], row["measured_high"], ".1%")
        yield Headline(
            f"Without what {row['part']} wrote {name} gives such keys {row['measured']:.1%}{interval} of its "
            f"attention instead of {row['clean']:.1%}; {row['predicted']:.1%} was predicted.",
            row["measured"],
            row["measured_low"],
            row["measured_high"],
            row["clean"],
            "the head with all parts",
            figure=f"removal_{str(name).lower()}",
        )


def _of_pairs(subject: Subject, head: HeadId) -> list[Explanation]:
    """The pairs of the first prompt that get most attention, each taken apart alone."""
    prompt = subject.task.prompts[0]
    own = [list(map(str, range(len(prompt))))]  # every pair is a group of its own
    try:
        found = lens.reading.explain_pairs(
            subject.model, [prompt], head, _pairs(subject), by=own, progress=False
        )
    except LensError:  # this prompt has no such pair
        return []
    mass = found.mass[:, 0]
    chosen = sorted(found.mass.shape[0] - 1 - mass[::-1].argsort(kind="stable")[::-1][:_PAIRS])
    places = [tuple(map(int, found.groups[group].split(" → "))) for group in chosen]
    return [
        lens.reading.explain(subject.model, prompt, head, query, key, progress=False)
        for query, key in sorted(places)
    ]


def _pair(found: Explanation) -> pd.DataFrame:
    """One row: where, how much, and in words."""
    return pd.DataFrame(
        {
            "query": [found.query],
            "key": [found.key],
            "query_token": [found.tokens[0]],
            "key_token": [found.tokens[1]],
            "mass": [found.mass],
            "logit": [found.logit],
            "above": [found.logit - found.average],
            "said": [" ".join(found.findings())],
        }
    )


def _products(found: Explanation) -> pd.DataFrame:
    """Products of the parts of each side that carry most."""
    table = found.table()
    for side in ("query", "key"):
        largest = found.side(side)["part"].head(_SIDE)
        table = table[table[f"{side}_part"].isin(largest)]
    places = {"query": found.query, "key": found.key}
    return table.drop(columns="content").assign(**places)


def _headlines(sides: pd.DataFrame) -> Iterator[Headline]:
    """Of each head the part of its keys that carries most, beside its median part."""
    rows = sides[sides["side"] == "key"]
    for name, own in rows.groupby("name", sort=False):
        yield from of_highest(
            own,
            "share",
            "{name} looks there because of {part}: on the key side it carries {value} of the logit, the median "
            "part {baseline}.",
            "the median part",
            figure=f"parts_{str(name).lower()}",
        )


def retrieval_kinds(subject: Subject) -> Section:
    """Retrieval heads by three definitions on copied needles, and the needles without the first of each."""
    trials = lens.tasks.needles.copied(
        subject.model, n=_TRIALS, length=32, needle=6, seed=subject.seed
    )
    found = lens.reading.retrieval(
        subject.model,
        trials,
        masked=_MASKED,
        draws=_RANDOM,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"heads": found.table(), "recall": found.recall(), "agreement": found.agreement()}
    rows = tables["recall"]
    own = rows[rows["by"] != "random"].sort_values("recall", kind="stable").to_dict("records")[0]
    chance = rows[(rows["by"] == "random") & (rows["masked"] == own["masked"])].to_dict("records")[
        0
    ]
    headline = Headline(
        f"Without the first {own['masked']} retrieval heads ({own['by']}) recall of needles is {own['recall']:.2f} "
        f"[{own['recall_low']:.2f}, {own['recall_high']:.2f}], without as many random others {chance['recall']:.2f}.",
        own["recall"],
        own["recall_low"],
        own["recall_high"],
        chance["recall"],
        "as many random heads",
        figure="recall",
    )
    return Section(
        name="retrieval_kinds",
        title="Retrieval heads by where they look, for whom, and what they bring",
        summary=found.findings(),
        limits=(f"{_TRIALS} copied random needles of 6 tokens in 32; not questions on text.",),
        columns=defined(tables.values(), _COLUMNS),
        configuration={
            "trials": _TRIALS,
            "masked": list(_MASKED),
            "draws": _RANDOM,
            "seed": subject.seed,
        },
        tables=tables,
        figures={"recall": found.plot()},
        headlines=(headline,),
    )


def faithfulness(subject: Subject) -> Section:
    """Whether attention, and what else scores tokens, says what the answers rest on."""
    prompts = subject.task.prompts[:_PROMPTS]
    block = _BLOCK if max(map(len, prompts)) > _LONGEST else None
    found = lens.reading.faithfulness(
        subject.model,
        prompts,
        draws=_DRAWS,
        block=block,
        seed=subject.seed,
        progress=subject.progress,
    )
    table = found.table()
    return Section(
        name="faithfulness",
        title="Whether attention explains the answer: tokens deleted by what scores them",
        summary=of_kind(found.findings(), "best", "sufficiency", "none", "unsupported"),
        limits=(
            *of_kind(found.findings(), "limit"),
            f"The answer is the likeliest token after each of the first {_PROMPTS} prompts of the task at most.",
        ),
        columns=defined([table], _COLUMNS),
        configuration={
            "shares": list(found.shares),
            "draws": _DRAWS,
            "block": block or 1,
            "seed": subject.seed,
        },
        tables={"faithfulness": table},
        figures={
            "sufficiency": found.plot(),
            "comprehensiveness": found.plot("comprehensiveness"),
        },
    )


def _heads(subject: Subject) -> list[HeadId]:
    """Those that are asked for, or the three of the profile that look most at such keys.

    Raises:
        LensError: a head that the model has not got.
    """
    if subject.settings.heads:
        return [subject.model.info.head(name) for name in listed(subject.settings.heads)]
    table = subject.run.heads
    rows = table[(table["metric"] == _METRIC[_pairs(subject)]) & (table["variant"] == "raw")]
    means = rows.groupby(["layer", "head"])["value"].mean().sort_values(ascending=False)
    return [HeadId(int(layer), int(head)) for layer, head in list(means.index)[:_HEADS]]


def _pairs(subject: Subject) -> str:
    return subject.settings.pairs


def _key(head: HeadId) -> str:
    return str(head).lower()


def _named(head: HeadId, table: pd.DataFrame) -> pd.DataFrame:
    """The table with its head in front."""
    columns = head_columns([head] * len(table))
    return pd.concat([pd.DataFrame(columns), table.reset_index(drop=True)], axis=1)


def _configuration(subject: Subject) -> dict[str, object]:
    return {
        "task": subject.settings.task,
        "pairs": _pairs(subject),
        "heads": [str(head) for head in _heads(subject)],
        "seed": subject.seed,
    }


_COLUMNS = {
    "name": "Layer and head.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "side": "Whether the part is of the queries or of the keys.",
    "part": "What wrote it: embedding, position, an earlier head or MLP, a bias.",
    "query_part": "What wrote that part of the query.",
    "key_part": "What wrote that part of the key.",
    "value": "Part of the logit, nats, mean over prompts.",
    "contrast": "The same less its mean over the keys that the query sees, nats.",
    "share": "Of all that the row is about: of the logit above the mean of its row, or of all that a map carries.",
    "literal": "Share of the needle that the head looks at most while it is generated (Wu et al.).",
    "output": "Logit that the head brings from the needle to the generated tokens, less that from as many others (LOCOS).",
    "trials": "Needles that there were; n of them came back.",
    "by": "Definition whose first heads are masked; random: as many others.",
    "masked": "How many heads give nothing.",
    "recall": "Share of the needle that comes back then.",
    "a": "One definition.",
    "b": "Another.",
    "correlation": "Rank correlation of all heads.",
    "query": "Place of the query in the first prompt; of retrieval: attention of the last tokens to the needle, less that of others (QRHead).",
    "key": "Place of the key.",
    "query_token": "What the query says.",
    "key_token": "What the key says.",
    "mass": "Attention of the query to the key.",
    "logit": "Of the pair, nats.",
    "above": "The same less the mean over the keys that the query sees.",
    "said": "The pair in words.",
    "distance": "Part of the logit that rotary embedding adds for the distance, nats.",
    "content": "Part of the logit if query and key stood at one place: without what rotary embedding adds, nats.",
    "size": "Mean absolute contrast of a pair, nats: far above the mean where signs cancel.",
    "pairs": "Pairs of query and key in all prompts.",
    "n": "Prompts.",
    "map": "Of queries and keys, or of values and output.",
    "component": "Singular component, largest singular value first.",
    "singular_value": "Of the map; that of queries and keys with the scale of the logits.",
    "carried": "Nats of the logit above the mean of its row, or share of the square of what the head writes.",
    "clean": "Attention to the keys of the pairs, as the model is.",
    "predicted": "The same without the part, by its products, norms held.",
    "measured": "The same when the model runs without the part.",
    "method": "What scores the tokens; random: random order.",
    "comprehensiveness": "Probability of the answer less that without the tokens that score highest, mean over shares.",
    "sufficiency": "Probability of the answer less that with those tokens alone; less is better.",
    "soft_comprehensiveness": "Loss of probability when high tokens are kept least, at equal expected retention, 0 to 1.",
    "soft_sufficiency": "What is kept of the probability when high tokens are kept most, at equal retention, 0 to 1.",
    "as_leave_one_out": "Rank correlation with the probability lost without each token.",
    "as_integrated_gradients": "Rank correlation with integrated gradients.",
    "above_random": "Share of the random orders with a lower comprehensiveness.",
    "error": "Mean absolute difference of predicted and measured.",
}
