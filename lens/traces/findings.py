"""What a table of head scores says, in plain words with its numbers.

A finding names heads whose score passes a stated threshold, with value and 95 % interval, or says
that none does and how far the highest came. 0.3 for sinks is the epsilon of Gu et al. (arXiv
2410.10781). The others sort heads for reading and prove nothing about cause; they lie far above what
attention without the pattern gives: uniform causal attention scores under 0.1 in each of them on the
copied prompts and on running text of 50 tokens and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lens.common.results import few

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class _Rule:
    """One kind of head to look for.

    Attributes:
        kind: name of the finding.
        metric: of `lens.traces.metrics`.
        threshold: heads above it are named.
        prefers: which prompts show it best, in order.
        one, many: what such heads are called.
        verb: what they do with their attention, and "on" what.
    """

    kind: str
    metric: str
    threshold: float
    prefers: tuple[str, ...]
    one: str
    many: str
    verb: str
    on: str


_RULES = (
    _Rule(
        "induction",
        "induction",
        0.3,
        ("copied", "text"),
        "induction head",
        "induction heads",
        "put",
        "on the token that followed the last time",
    ),
    _Rule(
        "sink",
        "sink_mass",
        0.3,
        ("text", "copied"),
        "head with a sink on the first token",
        "heads with a sink on the first token",
        "park",
        "on the first token",
    ),
    _Rule(
        "previous_token",
        "previous_token",
        0.4,
        ("copied", "text"),
        "previous-token head",
        "previous-token heads",
        "put",
        "on the token before",
    ),
    _Rule(
        "duplicate_token",
        "duplicate_token",
        0.3,
        ("copied", "text"),
        "duplicate-token head",
        "duplicate-token heads",
        "put",
        "on earlier copies of the same token",
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

    Example:
        >>> from lens.traces.profiles import prompt_table
        >>> first = lens.traces.findings(prompt_table(trace, "text"))[0]
        >>> first.kind, len(first.heads)
        ('sink', 6)
    """
    made = [finding for rule in _RULES if (finding := _apply(rule, table, most)) is not None]
    return sorted(made, key=lambda finding: not finding.found)


def _apply(rule: _Rule, table: pd.DataFrame, most: int) -> Finding | None:
    chosen = (table["metric"] == rule.metric) & (table["variant"] == "raw") & table["value"].notna()
    rows = table.loc[chosen.to_numpy()].to_dict("records")
    known = {row["prompt_id"] for row in rows}
    prompt_id = next((name for name in rule.prefers if name in known), None)
    if prompt_id is None:
        return None
    scores = [
        HeadScore(row["layer"], row["head"], row["value"], row["low"], row["high"])
        for row in rows
        if row["prompt_id"] == prompt_id
    ]
    scores.sort(key=lambda score: -score.value)
    passing = tuple(score for score in scores if score.value > rule.threshold)
    text = (
        _found(rule, passing, len(scores), prompt_id, most)
        if passing
        else f"No {rule.one}: the highest score {_ON[prompt_id]} is {scores[0]}, "
        f"not above {rule.threshold:g}."
    )
    heads = passing or (scores[0],)
    return Finding(rule.kind, rule.metric, prompt_id, rule.threshold, bool(passing), heads, text)


def _found(rule: _Rule, heads: Sequence[HeadScore], total: int, prompt_id: str, most: int) -> str:
    named = few(heads, most)
    where = _ON[prompt_id].capitalize()
    if len(heads) == 1:
        return (
            f"1 {rule.one} (of {total} heads) scores above {rule.threshold:g}. {where} it {rule.verb}s "
            f"{heads[0].value:.0%} of its attention {rule.on}: {named}."
        )
    low, high = f"{heads[-1].value:.0%}", f"{heads[0].value:.0%}"
    between = low if low == high else f"{low} to {high}"
    return (
        f"{len(heads)} {rule.many} (of {total} heads) score above {rule.threshold:g}. {where} they "
        f"{rule.verb} {between} of their attention {rule.on}: {named}."
    )
