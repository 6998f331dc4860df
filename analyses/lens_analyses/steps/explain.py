"""Why heads attend where they do: logits taken apart, parts taken out, singular components."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

import lens
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, of_kind, with_ends
from lens.figures.reading_changes import part_shares
from lens.reading.explanations import Explanation
from lens.reading.removals import Removals
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many, verdict
from lens_analyses.config.listed import listed
from lens_analyses.steps.columns import defined
from lens_analyses.steps.explain_shared import (
    COLUMNS,
    configuration,
    heads_of,
    key,
    named,
    pairs_of,
)
from lens_analyses.steps.headlines import beside, of_highest
from lens_analyses.steps.subject import Subject

_R = TypeVar("_R", bound=Result)
_CELLS = 15  # of each head, in the table
_PARTS = 6  # of each head that are taken out
_BESIDE: dict[str, Literal["previous", "duplicate"]] = {
    "induction": "previous",
    "duplicate": "previous",
    "previous": "duplicate",
}
_PAIRS, _SIDE = 10, 10  # pairs of the first prompt shown one by one, and parts of each side


def explain(subject: Subject) -> Section:
    """What wrote the queries and the keys of each chosen head on pairs of a kind."""
    sides, cells, components, pairs, products, figures = [], [], [], [], [], {}
    said: list[Sentence] = []
    for head in heads_of(subject):
        found = lens.reading.explain_pairs(
            subject.model, subject.task.prompts, head, pairs_of(subject),
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip
        said += found.findings()
        for side in ("key", "query"):
            table = found.side(side).drop(columns="group")
            sides.append(named(head, table.assign(side=side)))
        cells.append(named(head, found.table(top=_CELLS).drop(columns="group")))
        carried = lens.reading.components(
            subject.model, subject.task.prompts, head, pairs_of(subject),
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip
        said += of_kind(carried.findings(), "participation")
        components.append(named(head, carried.table()))
        for one in _of_pairs(subject, head):
            pairs.append(named(head, _pair(one)))
            products.append(named(head, _products(one)))
        figures |= {f"parts_{key(head)}": found.plot(), f"components_{key(head)}": carried.plot()}
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
        columns=defined(tables.values(), COLUMNS),
        configuration=configuration(subject),
        tables=tables,
        figures=figures,
        headlines=tuple(_headlines(tables["sides"])),
    )


def groups(subject: Subject) -> Section:
    """The same parts by how far query and key are apart, and by what kind of token they are."""
    tables, figures = [], {}
    said: list[Sentence] = []
    for head in heads_of(subject):
        for by in listed(subject.settings.by):
            found = lens.reading.explain_pairs(
                subject.model,
                subject.task.prompts,
                head,
                pairs_of(subject),
                by=by,
                seed=subject.seed,
                progress=subject.progress,
            )
            said += of_kind(found.findings(), "groups", "other")
            for side in ("key", "query"):
                leading = found.leading(side)
                tables.append(named(head, leading.assign(side=side, by=by)))
            figures[f"{by}_{key(head)}"] = part_shares(found)
    table = pd.concat(tables, ignore_index=True)
    return Section(
        name="groups",
        title="Why heads attend there, by distance and by class of token",
        summary=tuple(said),
        limits=(
            "Groups with pairs in one prompt, or with logits below their row's mean in some, have no interval, and no sentence counts them.",
            "Classes: the first token, delimiters, numbers, words or how one begins, and pieces that go on with one.",
        ),
        columns=defined(
            [table],
            COLUMNS
            | {"by": "What the group is of: offset (query less key) or class of the two tokens."},
        ),
        configuration=configuration(subject) | {"by": listed(subject.settings.by)},
        tables={"groups": table},
        figures=figures,
    )


def _of_each(
    subject: Subject, name: str, measure: Callable[[HeadId], _R]
) -> tuple[dict[HeadId, _R], pd.DataFrame, list[Sentence], dict[str, Any]]:
    """What is measured of each head: the results, one table, all sentences, and a figure a head, called after `name`."""
    found = {head: measure(head) for head in heads_of(subject)}
    table = pd.concat([named(head, one.table()) for head, one in found.items()], ignore_index=True)
    said = [sentence for one in found.values() for sentence in one.findings()]
    return found, table, said, {f"{name}_{key(head)}": one.plot() for head, one in found.items()}


def removal(subject: Subject) -> Section:
    """The attention without each of the largest parts of the keys, predicted and measured."""
    largest = subject.run.section("explain").tables["sides"]

    def without(head: HeadId) -> Removals:
        own = largest[(largest["name"] == str(head)) & (largest["side"] == "key")]
        written = [part for part in own["part"] if part not in ("key bias", "norm bias")]
        return lens.reading.removal(
            subject.model, subject.task.prompts, head, pairs_of(subject), parts=written[:_PARTS],
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip

    found, table, said, figures = _of_each(subject, "removal", without)
    return Section(
        name="removal",
        title="The same heads without a part of their keys: predicted, and what the model does",
        headlines=tuple(_without(found)),
        summary=tuple(said),
        limits=(
            "A part is taken out of what one head's keys read; what it does elsewhere stays as it is.",
            f"Of each head the {_PARTS} parts with the largest contrast are taken out.",
        ),
        columns=defined([table], COLUMNS),
        configuration=configuration(subject),
        tables={"removal": table},
        figures=figures,
    )


def subspace(subject: Subject) -> Section:
    """Heads without the directions of their queries that tell such keys from others, beside controls."""

    def without(head: HeadId) -> Result:
        return lens.reading.subspace(
            subject.model, subject.task.prompts, head, pairs_of(subject), beside=_BESIDE[pairs_of(subject)],
            seed=subject.seed, progress=subject.progress,
        )  # fmt: skip

    _, table, said, figures = _of_each(subject, "subspace", without)
    return Section(
        name="subspace",
        title="The same heads without a subspace of their queries, beside principal components, another head's and random directions",
        summary=tuple(said),
        limits=(
            "A drop alone proves nothing: directions with most of the variance take as much away in many heads.",
            "Directions come from every other prompt of the task, numbers from the rest.",
        ),
        columns=defined([table], COLUMNS),
        configuration=configuration(subject),
        tables={"subspace": table},
        figures=figures,
    )


def _without(found: dict[HeadId, Removals]) -> Iterator[Headline]:
    """Of each head the part without which its attention falls most, by the interval of the lowest of many, beside all parts."""
    for head, one in found.items():
        table = one.table()
        measured = table["measured"].to_numpy()
        if np.isnan(measured).all():
            continue
        least = int(np.nanargmin(measured))
        row: dict[Any, Any] = table.iloc[least].to_dict()
        change = columns("change", one.measured[[least]] - one.clean, one.seed).values()
        mean, low, high = (float(column[0]) for column in change)
        if verdict(*of_many(mean, low, high, len(table), one.measured.shape[-1])) != "below":
            continue
        ways = columns("measured", one.clean[None], one.seed)
        clean = {name: float(column[0]) for name, column in ways.items()}
        yield beside(
            f"Without what {row['part']} wrote {head} gives such keys {with_ends(row, 'measured', '.1%')} of its "
            f"attention instead of {with_ends(clean, 'measured', '.1%')}; {row['predicted']:.1%} was predicted.",
            "measured",
            row,
            clean,
            "the head with all parts",
            figure=f"removal_{key(head)}",
            many=len(table),
        )


def _of_pairs(subject: Subject, head: HeadId) -> list[Explanation]:
    """The pairs of the first prompt that get most attention, each taken apart alone."""
    prompt = subject.task.prompts[0]
    own = [list(map(str, range(len(prompt))))]  # every pair is a group of its own
    try:
        found = lens.reading.explain_pairs(
            subject.model, [prompt], head, pairs_of(subject), by=own, progress=False
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
            "{name} looks there because of {part}: on the key side it carries {value} of what lifts the logit above the "
            "mean of its row, the median part {baseline}.",
            "the median part",
            spec=".1%",
            figure=f"parts_{str(name).lower()}",
        )
