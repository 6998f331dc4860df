"""What a table of head scores says, in plain words with its numbers.

A finding counts heads whose score passes a stated threshold and whose whole 95 % interval lies above
what uniform attention and random weights score on the same prompts, and names both numbers; or it says
that none does and how far the highest came. On short prompts a head that looks at all keys alike passes
a threshold too: BOS + r + r with five tokens in r gives it an induction score of 0.33. 0.3 for sinks is
the epsilon of Gu et al. (arXiv 2410.10781). A finding proves nothing about cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lens.common.choices import Count
from lens.common.given import given_table
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
_COLUMNS = ("prompt_id", "metric", "variant", "layer", "head", "value", "low", "high", "uniform")
_COLUMNS += ("random_weights",)
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
        uniform, random_weights: scores that its interval had to be above, of attention that is spread
            evenly (the highest of the layers) and of the highest head of the same architecture with
            random weights; NaN where not known.
        found: whether any head did.
        heads: those that did, highest first; the single highest where none did.
        text: the sentence.
        count: how many heads did, and what they are called.
    """

    kind: str
    metric: str
    prompt_id: str
    threshold: float
    uniform: float
    random_weights: float
    found: bool
    heads: tuple[HeadScore, ...]
    text: str
    count: str


def findings(table: pd.DataFrame, *, most: Count = 6) -> list[Finding]:
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
        ('sink', 4)
    """
    given_table(table, *_COLUMNS)
    made = [finding for rule in _RULES if (finding := _apply(rule, table, most)) is not None]
    return sorted(made, key=lambda finding: not finding.found)


def _apply(rule: _Rule, table: pd.DataFrame, most: int) -> Finding | None:
    chosen = (table["metric"] == rule.metric) & (table["variant"] == "raw") & table["value"].notna()
    rows = table.loc[chosen.to_numpy()]
    there = set(rows["prompt_id"])
    prompt_id = next((name for name in rule.prefers if name in there), None)
    if prompt_id is None:
        return None
    rows = rows[rows["prompt_id"] == prompt_id]
    base = rows[["uniform", "random_weights"]].to_numpy(float)
    # an interval that is not known is not above
    above = rows["low"].to_numpy(float)[:, None] > base
    passes = (rows["value"] > rule.threshold) & (above | np.isnan(base)).all(1)
    passes &= ~np.isnan(base).all(1)
    scored = [
        (HeadScore(row["layer"], row["head"], row["value"], row["low"], row["high"]), passed)
        for row, passed in zip(rows.to_dict("records"), passes, strict=True)
    ]
    scored.sort(key=lambda pair: -pair[0].value)
    passing = tuple(score for score, passed in scored if passed)
    uniform, random = (float(rows[name].max()) for name in ("uniform", "random_weights"))
    even = {f"{rows['uniform'].min():.2f}", f"{uniform:.2f}"}
    named = {"uniform attention": " to ".join(sorted(even)) + " by layer" * (len(even) > 1)}
    named["random weights"] = f"{random:.2f}"
    known = {"uniform attention": uniform, "random weights": random}
    beside = " and ".join(f"{name} ({named[name]})" for name in named if not np.isnan(known[name]))
    text = (
        _found(rule, passing, len(scored), prompt_id, beside, most)
        if passing
        else f"No {rule.one}: the highest score {_ON[prompt_id]} is {scored[0][0]}; a head needs more "
        f"than {rule.threshold:g} and an interval above {beside or 'chance, which is not known'}."
    )
    heads = passing or (scored[0][0],)
    return Finding(
        rule.kind,
        rule.metric,
        prompt_id,
        rule.threshold,
        uniform,
        random,
        bool(passing),
        heads,
        text,
        _count(rule, len(passing), len(scored)),
    )


def _count(rule: _Rule, found: int, total: int) -> str:
    words = f"1 {rule.one}" if found == 1 else f"{found or 'no'} {rule.many}"
    return f"{words} (of {total} heads)"


def _found(
    rule: _Rule, heads: Sequence[HeadScore], total: int, prompt_id: str, beside: str, most: int
) -> str:
    named = few(heads, most)
    where = _ON[prompt_id].capitalize()
    one = len(heads) == 1
    low, high = f"{heads[-1].value:.0%}", f"{heads[0].value:.0%}"
    between = low if low == high else f"{low} to {high}"
    does = f"it {rule.verb}s {between} of its" if one else f"they {rule.verb} {between} of their"
    return (
        f"{_count(rule, len(heads), total)} {'scores' if one else 'score'} above {rule.threshold:g} and, with the whole interval, above {beside}. {where} {does} "
        f"attention {rule.on}: {named}."
    )
