"""The most surprising changes from one run to another, each beside what heads change by anyway.

A head's change of a share of attention stands beside the change of the median head in the same score on the same
prompts: where all heads move alike, none is told. A change of the loss stands beside none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId
from lens.figures.small import small
from lens.runs.comparison.pairing import SEEN, SHARES
from lens.runs.comparison.pictures import difference_grid, series_lines
from lens.runs.comparison.words import loss_on
from lens.runs.first_screen import MOST, OF_ONE, PROFILE, Shown
from lens.runs.headlines import Headline, highest
from lens.runs.schema import KIND_WORDS
from lens.stats.verdicts import of_many
from lens.traces.metrics import METRICS

if TYPE_CHECKING:
    from lens.runs.comparison.series import RunSeries
    from lens.runs.comparison.two_runs import Comparison
    from lens.runs.folders import Run

_LOSS = "loss"


@dataclass(frozen=True)
class _Change:
    """One headline, with what it is of: the score of a head, or the loss."""

    headline: Headline
    head: str
    metric: str
    prompts: str


def of_comparison(comparison: Comparison) -> list[Shown]:
    """The first screen of two runs: at most five changes, the most surprising first (docs/headlines.md)."""
    found = [
        *_of_heads(comparison.heads, "A", "B"),
        *_of_losses(comparison.losses, "A", "B"),
    ]
    return _shown(found, lambda one: difference_grid(comparison, one.metric, "raw", one.prompts))


def of_series(series: RunSeries) -> list[Shown]:
    """The first screen of a series: the same of the steps from one run to the next, of a loss that of the largest one."""
    found: list[_Change] = []
    largest: dict[str, _Change] = {}  # loss on a kind of prompts
    for place in range(1, len(series.runs)):
        ends = series.names[place - 1], series.names[place]
        rows = series.heads[series.heads["place"] == place]
        steps = {"since_last": "difference"} | {
            f"since_last_{end}": end for end in ("low", "high", "n")
        }
        rows = rows.rename(columns=steps).rename(columns={"value": "b"})
        rows = rows.assign(a=rows["b"] - rows["difference"])
        if _tokens(series.runs[place - 1]) != _tokens(series.runs[place]):
            rows["a"] = np.nan  # `b` is a mean over other prompts than the difference
        found += _of_heads(rows, *ends)
        rows = series.losses[series.losses["place"] == place]
        for one in _of_losses(rows, *ends, steps=len(series.runs) - 1):
            before = largest.setdefault(one.prompts, one)
            largest[one.prompts] = max(before, one, key=lambda step: step.headline.value)
    found += largest.values()
    return _shown(
        found, lambda one: series_lines(series, one.metric, "raw", one.prompts, heads=(one.head,))
    )


def _tokens(run: Run) -> list[tuple[str, ...]]:
    return sorted(map(tuple, run.prompts["token_strings"]))


def _of_heads(heads: pd.DataFrame, a: str, b: str) -> Iterator[_Change]:
    """Of each score and kind of prompt the head that changes most."""
    rows = heads[heads["metric"].isin(SHARES) & (heads["variant"] == "raw") & heads["low"].notna()]
    for (prompts, metric), part in rows.groupby(["prompts", "metric"], sort=False):
        size = part["difference"].abs()
        if len(part) < 2 or size.max() < SEEN:
            continue
        falls = part["difference"] < 0
        low, high = (
            (-part[other]).where(falls, part[end])
            for end, other in (("low", "high"), ("high", "low"))
        )
        best, fields = highest(size, low, high, int(part["n"].max()))
        row = part.iloc[best]
        head = str(HeadId(int(row["layer"]), int(row["head"])))
        ends = f"from {a} to {b}"
        if row["a"] == row["a"]:
            ends = f"from {row['a']:.2f} in {a} to {row['b']:.2f} in {b}"
        text = (
            f"{head} {METRICS[str(metric)].label.lower()} on {KIND_WORDS[str(prompts)]} {_moves(row, ends)}; "
            f"the median head's changes by {fields['baseline']:.2g}."
        )
        told = Headline(
            text, **fields, against="the median head", unit="", figure="change of every head"
        )
        yield _Change(told, head, str(metric), str(prompts))


def _of_losses(losses: pd.DataFrame, a: str, b: str, *, steps: int = 1) -> Iterator[_Change]:
    """Of each loss its change, with an interval as of one chosen of so many steps."""
    for row in losses.dropna(subset=["low"]).to_dict("records"):
        held = row["low"], row["high"]
        row["low"], row["high"] = of_many(row["difference"], *held, steps, int(row["n"]))
        ends = f"from {row['a']:.2f} nats a token in {a} to {row['b']:.2f} in {b}"
        low, high = sorted((abs(row["low"]), abs(row["high"])))
        if row["low"] * row["high"] <= 0 or abs(row["difference"]) < SEEN:
            continue
        told = Headline(
            f"The loss on {loss_on(row)} {_moves(row, ends)}.",
            *(abs(row["difference"]), low, high, 0.0, "no change"),
            unit="nats",
        )
        yield _Change(told, "", _LOSS, row["prompts"])


def _moves(row: Mapping[Any, Any] | pd.Series, ends: str) -> str:
    """A change in words, by its size and its interval."""
    size, sign = abs(row["difference"]), 1 if row["difference"] >= 0 else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    return f"{'rises' if sign > 0 else 'falls'} by {size:.2g} [{low:.2g}, {high:.2g}], {ends}"


def _shown(found: Iterable[_Change], draw: Callable[[_Change], Any]) -> list[Shown]:
    """The most surprising ones: each head and the loss on each kind of prompt once, no score more than twice."""
    order = sorted(found, key=lambda one: (-one.headline.surprise, -one.headline.value))
    chosen: list[_Change] = []
    for one in order:
        is_told = (one.head or one.prompts) in {other.head or other.prompts for other in chosen}
        alike = sum(other.metric == one.metric for other in chosen)
        if one.headline.stands and not is_told and alike < OF_ONE:
            chosen.append(one)
    return [
        Shown(
            one.headline,
            "losses" if one.metric == _LOSS else PROFILE,
            "Losses" if one.metric == _LOSS else "Heads",
            None if one.metric == _LOSS else small(draw(one)),
        )
        for one in chosen[:MOST]
    ]
