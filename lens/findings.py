"""What a table of head scores says, in plain words with its numbers.

A finding names heads whose score passes a stated threshold, with value and 95 % interval, or says
that none does and how far the highest came. The thresholds sort heads for reading; they prove
nothing about cause. They lie far above what attention without the pattern gives: a uniform causal
head of a 50-token prompt scores under 0.1 in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class _Rule:
    """One kind of head to look for.

    Attributes:
        kind: name of the finding.
        metric: of `lens.metrics`.
        threshold: heads above it are named.
        prefers: which prompts show it best, in order.
        one, many: what such heads are called.
        does: what such a head does; `{value}` is its score.
    """

    kind: str
    metric: str
    threshold: float
    prefers: tuple[str, ...]
    one: str
    many: str
    does: str


_RULES = (
    _Rule(
        "induction",
        "induction",
        0.3,
        ("copied", "text"),
        "induction head",
        "induction heads",
        "put {value} of their attention on the token that followed the last time",
    ),
    _Rule(
        "sink",
        "sink_mass",
        0.3,
        ("text", "copied"),
        "head with a sink on the first token",
        "heads with a sink on the first token",
        "park {value} of their attention on the first token",
    ),
    _Rule(
        "previous_token",
        "previous_token",
        0.4,
        ("copied", "text"),
        "previous-token head",
        "previous-token heads",
        "put {value} of their attention on the token before",
    ),
    _Rule(
        "duplicate_token",
        "duplicate_token",
        0.3,
        ("copied", "text"),
        "duplicate-token head",
        "duplicate-token heads",
        "put {value} of their attention on earlier copies of the same token",
    ),
)
_ON = {"text": "on text", "copied": "on copied random tokens"}


@dataclass(frozen=True)
class HeadScore:
    """One head's score in a finding; `low` and `high` are NaN where there is no interval."""

    layer: int
    head: int
    value: float
    low: float
    high: float

    @property
    def name(self) -> str:
        """`L3H5`."""
        return f"L{self.layer}H{self.head}"

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.name} {self.value:.2f}"
        return f"{self.name} {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Finding:
    """One sentence about the heads.

    Attributes:
        kind: `induction`, `sink`, `previous_token` or `duplicate_token`.
        metric, prompt_id: the rows of the table that it rests on.
        threshold: what a head had to pass.
        found: whether any head did.
        heads: those that did, highest first; the single highest where none did.
        text: the sentence.
    """

    kind: str
    metric: str
    prompt_id: str
    threshold: float
    found: bool
    heads: tuple[HeadScore, ...]
    text: str


def findings(table: pd.DataFrame, *, most: int = 6) -> list[Finding]:
    """What the long table of `heads.parquet` says, most telling first.

    Args:
        table: all of it; the pooled rows `text` and `copied` are used.
        most: heads named in one sentence; the others are counted.

    Returns:
        One finding per kind that was scored, those that found heads first.
    """
    made = [finding for rule in _RULES if (finding := _apply(rule, table, most)) is not None]
    return sorted(made, key=lambda finding: not finding.found)


def _apply(rule: _Rule, table: pd.DataFrame, most: int) -> Finding | None:
    rows = table[(table["metric"] == rule.metric) & (table["variant"] == "raw")]
    rows = rows[rows["value"].notna()]
    prompt_id = next((name for name in rule.prefers if (rows["prompt_id"] == name).any()), None)
    if prompt_id is None:
        return None
    rows = rows[rows["prompt_id"] == prompt_id].sort_values("value", ascending=False, kind="stable")
    scores = [
        HeadScore(row["layer"], row["head"], row["value"], row["low"], row["high"])
        for row in rows.to_dict("records")
    ]
    passing = [score for score in scores if score.value > rule.threshold]
    heads = tuple(passing) if passing else (scores[0],)
    text = (
        _found(rule, heads, len(scores), prompt_id, most)
        if passing
        else (
            f"No {rule.one}: the highest score {_ON[prompt_id]} is {heads[0]}, "
            f"below {rule.threshold:g}."
        )
    )
    return Finding(rule.kind, rule.metric, prompt_id, rule.threshold, bool(passing), heads, text)


def _found(rule: _Rule, heads: Sequence[HeadScore], total: int, prompt_id: str, most: int) -> str:
    named = ", ".join(str(head) for head in heads[:most])
    more = f" and {len(heads) - most} more" if len(heads) > most else ""
    low, high = heads[-1].value, heads[0].value
    value = f"{high:.0%}" if len(heads) == 1 else f"{low:.0%} to {high:.0%}"
    noun = rule.one if len(heads) == 1 else rule.many
    does = rule.does.format(value=value)
    if len(heads) == 1:
        does = does.replace("put ", "puts ", 1).replace("park ", "parks ", 1)
        does = does.replace("their attention", "its attention")
    pronoun = "it" if len(heads) == 1 else "they"
    where = _ON[prompt_id].capitalize()
    return f"{len(heads)} {noun} (of {total} heads). {where} {pronoun} {does}: {named}{more}."
