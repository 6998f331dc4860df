"""What each head does: role scores, on copied random tokens and on text."""

from collections.abc import Iterator

import pandas as pd

from lens import heads
from lens.common.errors import LensError
from lens.common.results import Sentence
from lens.heads.behaviour.roles import HeadRoles
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_roles
from lens_analyses.steps.subject import Subject

_SEEN_ON = {"induction": "copied", "duplicate_token": "copied", "previous_token": "copied"}
"""Scores that copied prompts show best; the others are read from text where there is some."""
_NAMED = ("induction", "previous_token", "first_token", "delimiter", "noop")


def roles(subject: Subject) -> Section:
    """Every role score of every head, with interval and what uniform attention would have."""
    found: dict[str, HeadRoles] = {}
    for kind in ("copied", "text"):
        prompts = subject.prompts(kind)
        if prompts:
            found[kind] = heads.roles(
                subject.model, prompts, seed=subject.seed, progress=subject.progress
            )
    if not found:
        raise LensError(
            "roles are of tokens in a row, and the prompts are pictures; see lens vision"
        )
    tables = {kind: one.table() for kind, one in found.items()}
    columns: dict[str, str] = {
        "name": "The head.",
        "layer": "Layer, from 0.",
        "head": "Head in the layer, from 0.",
        "prompts": "Number of prompts that the means run over.",
        "top_key_token": "What the strongest key is.",
    }
    for one in found.values():
        columns |= one.columns
    return Section(
        name="roles",
        title="What each head does",
        summary=tuple(_sentences(found, subject.run.heads)),
        limits=(
            "A role says where a head looks or how large its output is, not what the model loses "
            "without it: see importance.",
            "NaN means not scored: "
            + "; ".join(sorted({why for one in found.values() for why in one.reasons.values()}))
            + "."
            if any(one.reasons for one in found.values())
            else "Every score is defined for every head here.",
        ),
        columns=defined(tables.values(), columns),
        configuration={
            "prompts": {kind: one.prompts for kind, one in found.items()},
            "seed": subject.seed,
        },
        tables=tables,
        figures={kind: one.plot() for kind, one in found.items()},
        headlines=tuple(_headlines(found, subject.run.heads)),
    )


def _headlines(found: dict[str, HeadRoles], heads: pd.DataFrame) -> Iterator[Headline]:
    for column in _NAMED:
        kind, one = _seen(found, column)
        if column in one.columns:
            random = {column: _random(heads, kind, column)}
            yield from of_roles(one.table(), random, kind)


def _seen(found: dict[str, HeadRoles], column: str) -> tuple[str, HeadRoles]:
    """The prompts that show a score best, of those that were run."""
    kind = _SEEN_ON.get(column, "text")
    kind = kind if kind in found else next(iter(found))
    return kind, found[kind]


def _random(heads: pd.DataFrame, kind: str, column: str) -> float:
    """The highest head with random weights."""
    rows = heads[(heads["prompt_id"] == kind) & (heads["metric"] == column)]
    return rows.loc[rows["variant"] == "raw", "random_weights"].max()


def _sentences(found: dict[str, HeadRoles], heads: pd.DataFrame) -> Iterator[Sentence]:
    for column in _NAMED:
        kind, one = _seen(found, column)
        if column in one.columns:
            random = {column: _random(heads, kind, column)}
            yield from one.findings(columns=[column], most=3, random_weights=random)
