"""Measures of importance side by side, and how far they agree on the order of the heads."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lens import stats
from lens.common.errors import LensError
from lens.common.results import as_html, few
from lens.heads.measures.scores import HeadScores

COLUMNS = (
    "first",
    "second",
    "tau",
    "tau_low",
    "tau_high",
    "overlap",
    "overlap_low",
    "overlap_high",
    "overlap_by_chance",
)


@dataclass(frozen=True, repr=False, eq=False)
class Agreement:
    """Agreement of each pair of measures.

    Attributes:
        table: one row per pair: `first`, `second` (labels of the measures); `tau`, Kendall's tau-b
            over all heads; `overlap`, the share of the k most important heads that both have;
            `overlap_by_chance`, k / number of heads; `_low` and `_high`, 95 % bootstrap intervals
            over prompts, NaN for a single prompt. Tau is NaN where a measure gives all heads one
            value: there is no order to compare.
        k: how many heads are at the top.
        n: prompts of each measure, in the order given.
        seed: of the bootstrap.
        tops: label of each measure -> the k most important heads, first the most important one.
    """

    table: pd.DataFrame
    k: int
    n: tuple[int, ...]
    seed: int
    tops: Mapping[str, tuple[str, ...]]

    def findings(self) -> list[str]:
        """One sentence per pair: which heads one puts among its k most important and the other does
        not (the first six), and whether their orders agree beyond chance (tau's interval lies above 0)."""
        return [self._finding(row) for row in self.table.to_dict("records")]

    def _finding(self, row: Mapping[Hashable, Any]) -> str:
        first, second = row["first"], row["second"]
        tops = [self.tops[first], self.tops[second]]
        sides = [
            f"{few(only)} only by {label}"
            for label, mine, other in ((first, *tops), (second, *reversed(tops)))
            if (only := [head for head in mine if head not in other])
        ]
        heads = "head" if self.k == 1 else f"{self.k} heads"
        where = (
            f"they disagree on the most important {heads}: {'; '.join(sides)}"
            if sides
            else f"they name the same most important {heads}"
        )
        return f"{first} and {second}: {where}; {_order_in_words(row)}."

    def __repr__(self) -> str:
        rows = [
            f"{row['first']} and {row['second']}: tau {row['tau']:.2f} "
            f"[{row['tau_low']:.2f}, {row['tau_high']:.2f}], top {self.k} share {row['overlap']:.0%} "
            f"(by chance {row['overlap_by_chance']:.0%})"
            for row in self.table.to_dict("records")
        ]
        return "Agreement(" + "; ".join(rows) + ")"

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.table)


def join(*scores: HeadScores, seed: int = 0) -> pd.DataFrame:
    """One row per head, in the order of the model, with every measure side by side.

    Columns: `head`, `layer`, `number`, and of each measure its label (the value) and the label with
    ` low` and ` high` behind it, as in `HeadScores.table`. Measures on several tasks have the task in
    their label. Values of different metrics have different units: compare orders (`agreement`).

    Raises:
        LensError: none, of differing models, or one given twice.
    """
    _check_models(scores, least=1)
    joined: pd.DataFrame | None = None
    for score, label in zip(scores, _labels(scores), strict=True):
        names = {"value": label, "low": f"{label} low", "high": f"{label} high"}
        rows = score.table(seed=seed).sort_values(["layer", "number"], ignore_index=True)
        columns = rows[["head", "layer", "number", *names]].rename(columns=names)
        joined = columns if joined is None else joined.join(columns[list(names.values())])
    assert joined is not None
    return joined


def agreement(
    *scores: HeadScores, k: int | None = None, resamples: int = 300, seed: int = 0
) -> Agreement:
    """Kendall's tau-b and top-k overlap between all pairs of measures, with bootstrap intervals.

    `tau = (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b))` over pairs of
    heads (Kendall 1945). Measures of the same task have the same prompts redrawn together; others
    each their own.

    Args:
        scores: two or more, of one model.
        k: heads at the top; None: a quarter of them, at least one.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        LensError: fewer than two, of differing models, with one label on one task, a k that the
            model has not, or no resamples.
    """
    _check_models(scores, least=2)
    heads = scores[0].values.size
    k = max(1, heads // 4) if k is None else k
    if not 1 <= k <= heads:
        raise LensError(f"k must be 1 to {heads}, got {k}")
    if resamples < 1:
        raise LensError(f"resamples must be at least 1, got {resamples}")
    labels = _labels(scores)
    values = np.stack([score.values.ravel() for score in scores])
    again = _drawn(scores, resamples, seed)
    matrices = (
        stats.kendall(values),
        *stats.interval(stats.kendall(again)),
        stats.top_overlap(values, k),
        *stats.interval(stats.top_overlap(again, k)),
    )
    rows = [
        (labels[a], labels[b], *(float(matrix[a, b]) for matrix in matrices), k / heads)
        for a, b in combinations(range(len(scores)), 2)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    tops = {
        label: tuple(map(str, score.top(k))) for label, score in zip(labels, scores, strict=True)
    }
    return Agreement(table, k, tuple(score.n for score in scores), seed, tops)


def _order_in_words(row: Mapping[Hashable, Any]) -> str:
    tau, low, high = row["tau"], row["tau_low"], row["tau_high"]
    if np.isnan(tau):
        return "one of them gives all heads one value, so there is no order to compare"
    if np.isnan(low):
        return f"over all heads tau is {tau:.2f}, without an interval (a single prompt)"
    shown = f"tau {tau:.2f} [{low:.2f}, {high:.2f}]"
    if low > 0:
        return f"over all heads their orders agree beyond chance, {shown}"
    if high < 0:
        return f"over all heads their orders are opposed, {shown}"
    return f"over all heads their orders agree no better than chance, {shown}"


def _check_models(scores: tuple[HeadScores, ...], *, least: int) -> None:
    if len(scores) < least:
        raise LensError(f"too few measures: at least {least} must be given, got {len(scores)}")
    models = {(score.model, score.values.shape) for score in scores}
    if len(models) > 1:
        names = ", ".join(sorted(name for name, _ in models))
        raise LensError(f"only measures of one model can be compared, got {names}")


def _labels(scores: tuple[HeadScores, ...]) -> list[str]:
    """Names of the measures, with their tasks where those differ."""
    several = len({score.task for score in scores}) > 1
    labels = [f"{score.label} on {score.task}" if several else score.label for score in scores]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise LensError(f"{', '.join(twice)} is given twice; compare different measures")
    return labels


def _drawn(scores: tuple[HeadScores, ...], resamples: int, seed: int) -> np.ndarray:
    """Values [resamples, measures, heads] on prompts drawn again; no resamples for a single prompt."""
    random = np.random.default_rng(seed)
    weights: dict[tuple[str, int], np.ndarray] = {}
    if min(score.n for score in scores) < 2:
        return np.empty((0, len(scores), scores[0].values.size))
    found = []
    for score in scores:
        key = (score.task, score.n)
        if key not in weights:
            weights[key] = stats.draws(score.n, random, resamples)
        flat = score.per_prompt.reshape(-1, score.n)
        found.append(weights[key] @ flat.T / score.n)
    return np.stack(found, axis=1)
