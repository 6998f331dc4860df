"""`lens.policies.transfer`: does the pattern that one trace shows serve another, and does its LSE?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.choices import Seed, is_number
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.head_ids import all_heads, head_columns
from lens.common.results import Result, Sentence, few, with_ends
from lens.stats import quantile
from lens.stats.intervals import columns, known_mean
from lens.traces.trace import AttentionTrace

USABLE = 0.05
"""A row's masses are off by `exp(change of LSE) - 1` where the LSE of another run is taken: most that is usable."""

MEASURES = (
    "overlap", "recall", "own_recall", "efficiency", "random_recall", "lse_error", "cached_efficiency",
)  # fmt: skip
_RANGES = {"overlap": (-np.inf, 1), "lse_error": (0, np.inf)}  # all others are shares


@dataclass(frozen=True, repr=False, eq=False)
class PolicyTransfer(Result):
    """How well the best blocks of one trace serve another.

    Attributes:
        values: [measure, source, target, layer, head], NaN for a trace with itself. Measures are, in order:
            overlap: of the two sets of blocks, shared / in either, 0 as by chance, 1 the same; NaN where every block is chosen
            (`jaccard` of `lens.heads.stability` is of the best blocks of the whole map, not of each row);
            recall: mass of the target on the blocks of the source;
            own_recall: on as many blocks of its own;
            efficiency: the one over the other;
            random_recall: on as many blocks drawn at random, expected;
            lse_error: 99th percentile over rows of |exp(LSE of the target - LSE of the source) - 1|;
            cached_efficiency: mass of the target on as many blocks that are searched in it with the LSE of the source
            (AdaSpa's search), over that on its own best; NaN where it was not asked for.
        share: of the visible blocks of each row of blocks.
        layers: the model's numbers.
        seed: of the intervals.
        model: name of the first trace's.
    """

    values: np.ndarray
    share: float
    layers: tuple[int, ...]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `n` (traces; two of them are one unit), every measure as its mean
        over ordered pairs of traces with the 95 % interval over traces (`_low`, `_high`; NaN for two)."""
        table = head_columns(all_heads(self.layers, self.values.shape[-1]))
        units = paired_units(np.moveaxis(self._pairs, 1, -1))
        table["n"] = units.shape[-1]
        for name, values in zip(MEASURES, units, strict=True):
            table |= measure_columns(name, values, self.seed)
        return pd.DataFrame(table)

    @property
    def _pairs(self) -> np.ndarray:
        """[measure, ordered pair, layer, head]."""
        source, target = np.array(ordered_pairs(self.values.shape[1])).T
        return self.values[:, source, target]

    def findings(self) -> tuple[Sentence, ...]:
        """What carries over ("transfer"), where it does not ("heads"), and the LSE ("lse")."""
        table = self.table()
        units = paired_units(known_mean(self._pairs.reshape(*self._pairs.shape[:2], -1)))
        mean = {
            key: float(value[0])
            for name, one in zip(MEASURES, units, strict=True)
            for key, value in measure_columns(name, one[None], self.seed).items()
        }
        every = np.isnan(mean["overlap"])
        said = [
            Sentence(
                f"Every block is chosen where the best {self.share:.0%} of a row's blocks are, at least one: nothing is told "
                "of patterns; capture with a smaller block_size."
                if every
                else f"The best {self.share:.0%} of the blocks of one trace keep {mean['recall']:.1%} of the attention "
                f"of another, {with_ends(mean, 'efficiency', '.1%')} of what its own best keep "
                f"({mean['own_recall']:.1%}); as many random ones {mean['random_recall']:.1%}. Overlap above "
                f"chance {mean['overlap']:.2f}.",
                kind="transfer",
            )
        ]
        poor = table[table["efficiency_high"] < 0.9].sort_values("efficiency")
        if len(poor):
            said.append(
                Sentence(
                    f"{len(poor)} of {len(table)} heads keep less than 90 % of that, with the whole interval: {few(poor['name'].tolist())}; "
                    "their pattern has to be looked for anew.",
                    kind="heads",
                )
            )
        usable = int((table["lse_error"] < USABLE).sum())
        said.append(
            Sentence(
                f"The LSE of another trace is usable (99 % of rows within {USABLE:.0%}) in {usable} of "
                f"{len(table)} heads.",
                kind="lse",
            )
        )
        if not every and not np.isnan(mean["cached_efficiency"]):
            said.append(
                Sentence(
                    f"Blocks that are searched with the LSE of another trace keep {with_ends(mean, 'cached_efficiency', '.1%')} "
                    "of what as many of the best keep.",
                    kind="cached",
                )
            )
        return tuple(said)

    def __repr__(self) -> str:
        return f"PolicyTransfer({self.model}: {self.values.shape[2]} traces, {self.share:.0%} of the blocks)"


def transfer(
    traces: Sequence[AttentionTrace],
    *,
    share: float = 0.2,
    cached_lse: bool = False,
    seed: Seed = 0,
) -> PolicyTransfer:
    """Does the pattern of one prompt, checkpoint, precision or denoising step serve another? Every trace against every
    other.

    In each row of blocks the best `share` of the visible blocks of the source are taken, by their mass, and
    the target's mass on them counted. By chance, two sets of k of n blocks share k² / n and have 2 k - k² / n
    together; the overlap of chance is the sum of the one over rows by that of the other.

    Args:
        traces: at least two of one length, with the same layers, heads and blocks: of several prompts, or of
            one prompt in several models, or of one part at several steps of `lens.traces.denoising`.
        share: of the blocks; at least one is taken.
        cached_lse: also search the blocks of each trace with the LSE of each other one, from q and k (`keep_qk=True`):
            all pairs of tokens once, a block of rows at a time.
        seed: of the intervals.

    Raises:
        LensError: fewer than two traces, traces that do not fit together, a share that is none, block masses
            or LSE that were not captured, or with `cached_lse` q and k.

    Reference: Xia et al. (AdaSpa), arXiv 2502.21079, for patterns and LSE that are used again.

    Example:
        >>> found = lens.policies.transfer(traces)
        >>> found.table()[["name", "overlap", "recall", "own_recall"]]
    """
    traces = given_traces(traces)
    if len(traces) < 2:
        raise LensError(f"transfer needs at least two traces, got {len(traces)}")
    if not is_number(share) or not 0 < share < 1:
        raise LensError(f"share must be between 0 and 1, got {share!r}")
    shapes = {(one.layers, one.heads, one.length, _masses(one).shape) for one in traces}
    if len(shapes) > 1:
        raise LensError(
            "transfer needs traces of one length with the same layers, heads and blocks, got "
            + "; ".join(sorted(f"{len(s[0])} layers x {s[1]} heads, {s[2]} tokens" for s in shapes))
        )
    masses = [_masses(one) for one in traces]
    lse = [np.asarray(_variable(one, "lse"), float) for one in traces]
    seen = np.logical_or.reduce([one > 0 for one in masses])
    chosen = [best_blocks(one, seen, share) for one in masses]
    first = masses[0]
    cached = np.full((len(traces), len(traces), *first.shape[:2]), np.nan)
    if cached_lse:
        for target in traces:
            for head in target.every_head:
                if why := target.tile_refusal(*head):
                    raise LensError(why)
        cached = np.stack([_cached(lse, target, seen, share) for target in traces], 1)
    values = np.full((len(MEASURES), len(traces), len(traces), *first.shape[:2]), np.nan)
    for a, blocks in enumerate(chosen):
        for b, mass in enumerate(masses):
            if a != b:
                found = transfer_measures(blocks, chosen[b], mass, seen, lse[a], lse[b])
                values[:, a, b] = [*found, cached[a, b]]
    return PolicyTransfer(values, float(share), traces[0].layers, seed, traces[0].model)


def transfer_measures(
    source: np.ndarray,
    own: np.ndarray,
    mass: np.ndarray,
    seen: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> list[np.ndarray]:
    """The measures of `PolicyTransfer` for one source and target, [layers, heads] each, but for the cached one."""
    taken, owned, there = (one.sum(-1) for one in (source, own, seen))  # numbers of blocks
    alike = (taken * owned / np.maximum(there, 1)).sum(-1)  # shared by chance, row by row
    chance = alike / ((taken + owned).sum(-1) - alike)
    both, either = (source & own).sum((-1, -2)), (source | own).sum((-1, -2))
    overlap = (both / either - chance) / np.where(chance < 1, 1 - chance, np.nan)
    whole = mass.sum((-1, -2))
    recall, own_recall = ((mass * one).sum((-1, -2)) / whole for one in (source, own))
    rows = taken / np.maximum(there, 1)
    weights = mass.sum(-1)
    random = (rows * weights).sum(-1) / weights.sum(-1)
    off = np.abs(np.expm1(np.where(np.isfinite(after) & np.isfinite(before), after - before, 0)))
    efficiency = recall / own_recall
    return [overlap, recall, own_recall, efficiency, random, np.asarray(quantile(off, 0.99))]


def ordered_pairs(n: int) -> list[tuple[int, int]]:
    """Every two of n, in both orders."""
    return [(a, b) for a in range(n) for b in range(n) if a != b]


def paired_units(values: np.ndarray) -> np.ndarray:
    """[..., units] that are independent of each other, with the mean of what is known of `values` [..., ordered pairs].

    Pairs share members: each member's unit is its pseudo-value of the jackknife, what the mean over pairs owes to it, so that
    three traces are three units, and a unit of shares may be below 0 or above 1 (`measure_columns` ends where shares do).
    Two members, in two orders, are one unit.

    Reference: Arvesen, Jackknifing U-statistics, 1969, Annals of Mathematical Statistics 40(6).
    """
    n = math.isqrt(values.shape[-1]) + 1  # n (n - 1) pairs
    mean = known_mean(values)
    if n < 3:
        return mean[..., None]
    pairs = np.array(ordered_pairs(n))
    without = [known_mean(values[..., (pairs != one).all(1)]) for one in range(n)]
    units = np.stack([n * mean - (n - 1) * rest for rest in without], -1)
    return units + (mean - units.mean(-1))[..., None]  # 0 where all pairs are known


def measure_columns(name: str, units: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """`lens.stats.intervals.columns` of one of `MEASURES` or a share, over units; the ends lie where the measure can be."""
    found = columns(name, units, seed, shares=False)
    least, most = _RANGES.get(name, (0, 1))
    for end in ("low", "high"):
        found[f"{name}_{end}"] = np.clip(found[f"{name}_{end}"], least, most)
    return found


def best_blocks(mass: np.ndarray, seen: np.ndarray, share: float) -> np.ndarray:
    """bool of the best `share` of the seen blocks of each row of blocks, at least one."""
    return best_of(mass, seen, np.maximum(1, np.floor(share * seen.sum(-1, keepdims=True) + 1e-9)))


def best_of(mass: np.ndarray, seen: np.ndarray, count: np.ndarray) -> np.ndarray:
    """bool of the best `count` [..., 1] of the seen blocks of each row."""
    order = np.argsort(-np.where(seen, mass, -1), axis=-1, kind="stable")
    place = np.argsort(order, axis=-1, kind="stable")
    return (place < count) & seen


def searched_efficiency(
    exact: np.ndarray, searched: np.ndarray, seen: np.ndarray, share: float
) -> np.ndarray:
    """[...], mass on the best blocks by `searched` over that on the best by `exact`, both [..., I, J]."""
    kept, own = ((exact * best_blocks(one, seen, share)).sum((-1, -2)) for one in (searched, exact))
    return kept / own


def _cached(
    sources: Sequence[np.ndarray], target: AttentionTrace, seen: np.ndarray, share: float
) -> np.ndarray:
    """[source, layer, head]: the blocks of a trace by the sums of exp(s - LSE of the source) against its own best.

    exp(s - L_a) is the probability times exp(L_b - L_a).
    """
    size = target.attrs["block_size"]
    own = np.asarray(_variable(target, "lse"), float)
    drift = own - np.stack(sources)  # [source, layer, head, query]
    factor = np.exp(np.where(np.isfinite(drift), drift, 0))
    exact = np.zeros(seen.shape)
    searched = np.zeros((len(sources), *seen.shape))
    starts = np.arange(0, target.length, size)
    for place, layer in enumerate(target.layers):
        for head in range(target.heads):
            for block, first in enumerate(range(0, target.queries, size)):
                rows = (first, min(first + size, target.queries))
                pooled = np.add.reduceat(
                    target.tile(layer, head, rows, (0, target.length)), starts, 1
                )
                exact[place, head, block] = pooled.sum(0)
                searched[:, place, head, block] = factor[:, place, head, slice(*rows)] @ pooled
    return searched_efficiency(exact, searched, seen, share)


def _masses(trace: AttentionTrace) -> np.ndarray:
    """[layers, heads, query_blocks, key_blocks], mean over the rows of a block."""
    return np.nan_to_num(np.asarray(_variable(trace, "block_mass"), float))


def _variable(trace: AttentionTrace, name: str) -> np.ndarray:
    if name not in trace.dataset:
        raise LensError(f"the trace has no {name}; capture it with statistics='all'")
    return trace.dataset[name].values
