"""Where the variance of a head score comes from: the head, the prompt, or the condition.

>>> short = lens.capture(model, [text[:12] for text in texts])
>>> lens.traces.variance({"12 tokens": short, "24 tokens": traces}, metric="entropy").table()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.choices import Count, Seed, check_mapping
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, counted, with_ends
from lens.stats.intervals import around
from lens.traces.profiles import prompt_table
from lens.traces.trace import AttentionTrace

SOURCES = {
    "condition": (0,),
    "prompt": (1,),
    "head": (2,),
    "condition × prompt": (0, 1),
    "condition × head": (0, 2),
    "prompt × head": (1, 2),
    "residual": (0, 1, 2),
}
"""Each source of variance, and the axes of [condition, prompt, head] that it runs over."""


@dataclass(frozen=True, repr=False, eq=False)
class VarianceShares(Result):
    """One metric of every head, under several conditions, and the shares of its variance.

    Attributes:
        values: [condition, prompt, head], heads of all layers in one row; float64.
        conditions: their names.
        metric, variant: of `lens.traces.metrics`.
        drawn: [resample, source], the shares on prompts drawn again; none for a single prompt.
    """

    values: np.ndarray
    conditions: tuple[str, ...]
    metric: str
    variant: str
    drawn: np.ndarray

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in the sum of squares; they sum to 1."""
        return dict(zip(SOURCES, shares_of(self.values).tolist(), strict=True))

    def table(self) -> pd.DataFrame:
        """One row per source: `source`, `share`, `low`, `high` (95 % bootstrap over prompts), `n`."""
        shares, n = list(self.shares.values()), self.values.shape[1]
        low, high = around(shares, self.drawn, n, least=0, most=1)
        return pd.DataFrame(
            {
                "source": list(SOURCES),
                "share": shares,
                "low": low,
                "high": high,
                "n": n,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """The three sources that most of the variance belongs to, each beside its share of the degrees of freedom, which is
        what noise gives it ("shares")."""
        size = self.values.shape
        noise = {
            name: np.prod([size[axis] - 1 for axis in axes]) / (self.values.size - 1)
            for name, axes in SOURCES.items()
        }
        rows = self.table().sort_values("share", ascending=False, kind="stable").head(3)
        shown = ", ".join(
            f"{row['source']} {with_ends(row, 'share', '.0%', plain=True)} (noise alone {noise[row['source']]:.0%})"
            for row in rows.to_dict("records")
        )
        _, prompts, heads = size
        alone = "; one prompt has no interval" if prompts == 1 else ""
        return (
            Sentence(
                f"Of the variance of {self.metric} ({self.variant}) over the conditions {', '.join(self.conditions)}, "
                f"{counted(prompts, 'prompt')} and {counted(heads, 'head')} most belongs to: {shown}{alone}.",
                kind="shares",
            ),
        )

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        conditions, prompts, heads = self.values.shape
        return (
            f"VarianceShares({self.metric} ({self.variant}) over {conditions} conditions, "
            f"{prompts} prompts, {heads} heads: {shown})"
        )


def variance(
    conditions: Mapping[str, Sequence[AttentionTrace]],
    *,
    metric: str = "entropy",
    variant: str = "raw",
    resamples: Count = 200,
    seed: Seed = 0,
) -> VarianceShares:
    """Split the variance of a head metric over conditions, prompts, heads and their interactions.

    Balanced analysis of variance without replicates: with y[c, p, h] the metric, the sum of squares
    of each source is that of its effects (means over the other axes, less the effects inside them),
    and shares are of the total. A head is stable where the condition and what interacts with it have
    small shares. Lengths may differ: only the means of each trace are compared.

    Args:
        conditions: name -> traces; prompt number i is the same prompt in all of them.
        metric, variant: of `lens.traces.metrics`.
        resamples: draws of prompts for the intervals.
        seed: of the draws.

    Example:
        >>> texts = [lens.tasks.copied(small, 25, seed=seed) for seed in range(2)]
        >>> whole, half = (lens.capture(small, [ids[:n] for ids in texts]) for n in (51, 25))
        >>> list(lens.traces.variance({"whole": whole, "half": half}).shares)[:3]
        ['condition', 'prompt', 'head']

    Raises:
        LensError: fewer than two conditions, unequal numbers of traces, models of differing sizes, a
            metric that is unknown or was not scored for a head, or nothing that varies.
    """
    check_mapping(conditions=conditions)
    if len(conditions) < 2:
        raise LensError(f"variance compares at least two conditions, got {len(conditions)}")
    counts = {name: len(traces) for name, traces in conditions.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise LensError(f"conditions must have equally many traces, at least one; got {counts}")
    sizes = {(trace.layers, trace.heads) for traces in conditions.values() for trace in traces}
    if len(sizes) > 1:
        raise LensError(f"all traces must have the same layers × heads, got {sorted(sizes)}")
    values = np.array(
        [[_scores(trace, metric, variant) for trace in traces] for traces in conditions.values()]
    )
    if np.ptp(values) == 0:
        raise LensError(
            f"{metric} is {values.flat[0]:.3g} everywhere, so it has no variance to split"
        )
    drawn = np.empty((0, len(SOURCES)))
    prompts = values.shape[1]
    if prompts > 1:
        random = np.random.default_rng(seed)
        again = random.integers(prompts, size=(resamples, prompts))
        drawn = np.array([shares_of(values[:, rows]) for rows in again])
    return VarianceShares(values, tuple(conditions), metric, variant, drawn)


def shares_of(values: np.ndarray) -> np.ndarray:
    """Shares [source] of the sum of squares of [condition, prompt, head], in the order of `SOURCES`."""
    effects: dict[tuple[int, ...], np.ndarray] = {(): values.mean(keepdims=True)}
    squares = []
    for axes in SOURCES.values():
        others = tuple(axis for axis in range(3) if axis not in axes)
        effect = values.mean(others, keepdims=True) if others else values
        for inside, known in list(effects.items()):
            if set(inside) < set(axes):
                effect = effect - known
        effects[axes] = effect
        squares.append((np.broadcast_to(effect, values.shape) ** 2).sum())
    return np.array(squares) / np.sum(squares)


def _scores(trace: AttentionTrace, metric: str, variant: str) -> np.ndarray:
    """The metric of every head [heads] of one trace."""
    table = prompt_table(trace, "p", seed=None, uniform=False)
    rows = table[((table["metric"] == metric) & (table["variant"] == variant)).to_numpy()]
    if rows.empty:
        have = ", ".join(dict.fromkeys(table["metric"]))
        raise LensError(f"there is no metric {metric!r} ({variant}); there are {have}")
    rows = rows.sort_values(["layer", "head"])
    values = rows["value"].to_numpy(float)
    if np.isnan(values).any():
        missing = rows[np.isnan(values)].iloc[0]
        head = HeadId(int(missing["layer"]), int(missing["head"]))
        raise LensError(
            f"{metric} ({variant}) was not scored for {head}: {missing['detail'] or 'no reason given'};"
            " choose other prompts or another metric"
        )
    return values
