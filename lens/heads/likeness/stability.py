"""Whether a head keeps its pattern when something changes: prompt, seed, checkpoint, paraphrase.

A sparse pattern or a cached log-sum-exp can be reused only where it is stable. Block maps and LSE of
traces are compared, trace by trace, so nothing is run again.

>>> untrained = lens.capture(lens.models.random_weights(model), texts)
>>> found = lens.heads.stability({"trained": traces, "untrained": untrained})
>>> found.table().query("metric == 'jaccard'")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from scipy.special import entr

from lens import stats
from lens.common.choices import check_mapping, is_number
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence
from lens.stats import over_units
from lens.stats.controls import jaccard_by_chance
from lens.stats.intervals import known_mean
from lens.stats.verdicts import by_chance, of_many_told
from lens.traces.trace import AttentionTrace
from lens.traces.uniform import UniformRows

USABLE = 0.05
"""A cached LSE serves where 99 % of rows have `|exp(drift) - 1|` below this."""

MAP_METRICS = ("jaccard", "recall", "efficiency", "js", "correlation")
UNIFORM = "jaccard_uniform"


@dataclass(frozen=True, repr=False, eq=False)
class HeadStability(Result):
    """Every head in one condition against the same head in another, by pairs of prompts.

    Attributes:
        values: (first, second, metric, variant) -> [head, prompt], heads of all layers in one row;
            NaN where a head cannot be scored.
        density: share of the blocks that are in a top set.
        heads: what the values are of.
    """

    values: dict[tuple[str, str, str, str], np.ndarray]
    density: float
    heads: tuple[HeadId, ...]

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per pair of conditions, metric, variant and head.

        Columns: `first`, `second`, `metric`, `variant` ("raw", or "sink_excluded": first key block
        and diagonal blocks left out), `name`, `layer`, `head`, `value`, `low`, `high` (95 % bootstrap
        interval over prompts, NaN for one), `n`.
        """
        parts = []
        heads = head_columns(self.heads)
        for key, values in self.values.items():
            condition = dict(zip(("first", "second", "metric", "variant"), key, strict=True))
            scored = ~np.isnan(values)
            n = scored.sum(1)
            low, high = over_units(np.where(scored, values, 0).T, scored.T, seed)
            value = {"value": known_mean(values), "low": low, "high": high}
            parts.append(pd.DataFrame(condition | heads | value | {"n": n}))
        return pd.concat(parts, ignore_index=True)

    def reusable(self, first: str, second: str) -> np.ndarray:
        """[head] bool, in the order of `heads`: whether the LSE of `first` serves for `second` on every prompt.

        The rule: the 99th percentile over rows of `|exp(LSE_second - LSE_first) - 1|` is below 0.05.

        Raises:
            LensError: a condition that was not compared, or traces without LSE.
        """
        key = (first, second, "mass_error_p99", "raw")
        if key not in self.values:
            raise LensError(
                f"there is no LSE drift from {first!r} to {second!r}; compared are "
                f"{sorted({pair[:2] for pair in self.values})}, and traces need lse"
            )
        return np.all(self.values[key] < USABLE, axis=1)

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """How many heads share more of their strongest blocks than by chance and than with uniform attention, and which
        most ("pattern"), once for both orders of two conditions; and in how many the LSE of one serves for the other
        ("lse")."""
        said: list[Sentence] = []
        seen: list[set[str]] = []
        table = self.table(seed=seed)
        for first, second in dict.fromkeys(key[:2] for key in self.values):
            between = (table["first"] == first) & (table["second"] == second)
            if {first, second} not in seen:
                seen.append({first, second})
                said += self._shared(table[between.to_numpy()], first, second, seed)
            key = (first, second, "mass_error_p99", "raw")
            if key in self.values:
                usable, n = self.reusable(first, second), self.values[key].shape[1]
                said.append(
                    Sentence(
                        f"The LSE of {first} serves for {second} on {_pairs(n)} in {int(usable.sum())} of {usable.size} heads "
                        f"(99 % of rows within {USABLE:.0%}).",
                        kind="lse",
                    )
                )
        return tuple(said)

    def _beyond_uniform(self, first: str, second: str, variant: str, seed: int) -> str:
        """In how many heads it is the pattern of the head that lasts, and not that of its mask."""
        even = self.values.get((first, second, UNIFORM, variant))
        if even is None or np.isnan(even).all():
            return "what they share with uniform attention is not known"
        more = self.values[first, second, "jaccard", variant] - even
        scored = ~np.isnan(more)
        low, _ = over_units(np.where(scored, more, 0).T, scored.T, seed)
        heads = int(scored.any(1).sum())
        return f"{int((low > 0).sum())} of {heads} more than with uniform attention (the median head {np.nanmedian(even):.2f})"

    def _shared(self, table: pd.DataFrame, first: str, second: str, seed: int) -> list[Sentence]:
        """Jaccard indices of two conditions, of maps without the sink and the diagonal where they are."""
        rows = table[(table["metric"] == "jaccard").to_numpy()].dropna(subset="value")
        without = rows[(rows["variant"] == "sink_excluded").to_numpy()]
        rows = without if len(without) else rows
        if rows.empty:
            return []
        best, n = rows.iloc[int(rows["value"].to_numpy().argmax())], int(rows["n"].max())
        above = int((rows["low"] > 0).sum())
        how_many = (
            f"{above} of {len(rows)} heads share more of their strongest {self.density:.0%} of blocks than random ones do "
            f"({by_chance(len(rows), sides=1):.1f} by chance), {self._beyond_uniform(first, second, rows['variant'].iloc[0], seed)}"
            if n > 1
            else f"one pair has no interval for {len(rows)} heads"
        )
        left = ", the first key block and the diagonal left out" if len(without) else ""
        return [
            Sentence(
                f"Between {first} and {second}, {_pairs(n)}{left}: {how_many}; most {best['name']}, Jaccard index above chance "
                f"{of_many_told(best, 'value', '.2f', len(rows), n, plain=True, most=1)}, the median head "
                f"{rows['value'].median():.2f} (0 is chance, 1 the same blocks).",
                kind="pattern",
            )
        ]

    def __repr__(self) -> str:
        shown = [
            f"{first} to {second} {np.nanmean(values):.2f}"
            for (first, second, metric, variant), values in self.values.items()
            if metric == "jaccard" and variant == "raw" and np.isfinite(values).any()
        ]
        return (
            f"HeadStability({len(self.heads)} heads, top {self.density:.0%} of blocks; Jaccard above "
            f"chance, mean over heads: {', '.join(shown[:6])})"
        )


def _pairs(count: int) -> str:
    return "one pair of prompts" if count == 1 else f"all {count} pairs of prompts"


def stability(
    conditions: Mapping[str, Sequence[AttentionTrace]], *, density: float = 0.2
) -> HeadStability:
    """Compare each head across conditions; prompt number i of one with number i of the other.

    With M the block masses and I the top `density` of the blocks that a query of the layer sees:

        jaccard      (J - J0) / (1 - J0), J = |Ia & Ib| / |Ia | Ib|, J0 = d / (2 - d) what random sets
                     of density d share; 1 = the same blocks, 0 = as by chance
        jaccard_uniform  the same of uniform attention's blocks and those of a or b, whichever is more: what a
                     mask alone makes heads share; NaN where a trace does not know who sees whom
        recall       mass of b on the blocks of a: sum over Ia of M_b / sum of M_b
        efficiency   recall / what b's own top blocks hold; 1 = a's pattern serves b as well
        js           mean over block rows of the divergence of M, nats: a lower bound of that of the
                     attention itself
        correlation  Spearman's, of the block masses
        drift        mean over rows of LSE_b - LSE_a; drift_std its standard deviation, drift_p99 the
                     99th percentile of its size, mass_error_p99 that of |exp(drift) - 1|

    The first five also without the first key block and the diagonal blocks, which dominate them
    ("sink_excluded"); recall and efficiency are not symmetric, so both orders are given. A prompt
    against itself must give 1 and drift 0; different prompts show how much a head varies at all.

    Args:
        conditions: name -> traces. Lengths, blocks and heads must be the same; for prompts of several
            lengths use `lens.traces.variance`.
        density: share of the blocks in a top set.

    Reference: AdaSpa, 2025, arXiv 2502.21079 (patterns and LSE that last over denoising steps).

    Raises:
        LensError: fewer than two conditions, traces that do not fit each other, no block maps, or a
            density that leaves no choice.

    Example:
        >>> untrained = lens.capture(lens.models.random_weights(model), texts, progress=False)
        >>> lens.heads.stability({"trained": traces, "untrained": untrained}).table().head()
    """
    _check(conditions, density)
    found: dict[tuple[str, str, str, str], list[np.ndarray]] = {}
    for first, second in permutations(conditions, 2):
        for a, b in zip(conditions[first], conditions[second], strict=True):
            for (metric, variant), values in _compare(a, b, density).items():
                found.setdefault((first, second, metric, variant), []).append(values)
    some = next(iter(conditions.values()))[0]
    return HeadStability(
        values={key: np.stack(parts, 1) for key, parts in found.items()},
        density=density,
        heads=tuple(some.every_head),
    )


def _compare(
    a: AttentionTrace, b: AttentionTrace, density: float
) -> dict[tuple[str, str], np.ndarray]:
    """(metric, variant) -> [heads]."""
    parts: dict[tuple[str, str], list[float]] = {}
    masses = [trace.dataset["block_mass"].values.astype(float) for trace in (a, b)]
    for at, layer in enumerate(a.layers):
        even, seen = _seen_blocks(a, b, layer)
        row, column = np.indices(seen.shape)
        rest = seen & (column > 0)
        if not a.cross:
            rest &= column != row
        for variant, allowed in (("raw", seen), ("sink_excluded", rest)):
            for x, y in zip(masses[0][at], masses[1][at], strict=True):
                score = dict.fromkeys((*MAP_METRICS, UNIFORM), np.nan)
                if round(density * int(allowed.sum())) >= 1:
                    score = map_scores(x, y, allowed, density)
                    score[UNIFORM] = max(_with_uniform(even, z, allowed, density) for z in (x, y))
                for metric, value in score.items():
                    parts.setdefault((metric, variant), []).append(value)
    found = {key: np.array(values) for key, values in parts.items()}
    if "lse" in a.dataset and "lse" in b.dataset:
        for metric, values in _drift(a, b).items():
            found[metric, "raw"] = values
    return found


def _seen_blocks(
    a: AttentionTrace, b: AttentionTrace, layer: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """[query_block, key_block] of uniform attention where it is known of both, and which blocks a query sees."""
    size, causal = int(a.attrs["block_size"]), bool(a.attrs["causal"])
    hidden = [trace.visible.sel(layer=layer).values == 0 for trace in (a, b)]
    windows = {trace.window(layer) for trace in (a, b)}
    known = len(windows) == 1 and not np.any(hidden)
    known = known and all(trace.has_plain_mask(layer) for trace in (a, b))
    even = UniformRows(
        np.arange(a.length),
        causal=causal,
        window=windows.pop() if len(windows) == 1 else None,
        prefix=0,
        queries=a.queries if a.cross else None,
    ).blocks(size)
    return (even if known else None), even > 0


def _with_uniform(
    even: np.ndarray | None, mass: np.ndarray, allowed: np.ndarray, density: float
) -> float:
    """The Jaccard index above chance of a map and that of uniform attention; blocks that tie are in by their share."""
    if even is None:
        return float("nan")
    x, count = even[allowed], max(1, round(density * int(allowed.sum())))
    cut = np.sort(x)[-count]
    tied = np.isclose(x, cut, rtol=1e-9, atol=0)
    above = (x > cut) & ~tied
    share = above + tied * (count - above.sum()) / tied.sum()
    both = float(share[stats.top(mass[allowed], count)].sum())
    by_chance = float(jaccard_by_chance(np.full(2, count / len(x)))[0, 1])
    jaccard = both / (2 * count - both)
    return (jaccard - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")


def map_scores(
    a: np.ndarray, b: np.ndarray, allowed: np.ndarray, density: float
) -> dict[str, float]:
    """The map metrics of `stability` of two block maps [query_block, key_block], on the allowed blocks.

    Rows are renormalised to the allowed blocks for "js"; NaN where there is no mass to compare.
    """
    x, y = a[allowed], b[allowed]
    count = max(1, round(density * len(x)))
    top_a, top_b = (set(stats.top(values, count).tolist()) for values in (x, y))
    by_chance = float(jaccard_by_chance(np.full(2, count / len(x)))[0, 1])
    jaccard = len(top_a & top_b) / len(top_a | top_b)
    total = y.sum()
    recall = y[sorted(top_a)].sum() / total if total > 0 else np.nan
    own = y[sorted(top_b)].sum()
    return {
        "jaccard": (jaccard - by_chance) / (1 - by_chance) if by_chance < 1 else np.nan,
        "recall": float(recall),
        "efficiency": float(recall * total / own) if own > 0 else np.nan,
        "js": _row_divergence(np.where(allowed, a, 0), np.where(allowed, b, 0)),
        "correlation": stats.spearman(x, y),
    }


def _row_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over the rows in which both have mass."""
    sums = a.sum(1), b.sum(1)
    both = (sums[0] > 0) & (sums[1] > 0)
    if not both.any():
        return float("nan")
    p, q = (x[both] / total[both, None] for x, total in zip((a, b), sums, strict=True))
    js = entr((p + q) / 2).sum(-1) - (entr(p).sum(-1) + entr(q).sum(-1)) / 2
    return float(js.clip(0).mean())


def _drift(a: AttentionTrace, b: AttentionTrace) -> dict[str, np.ndarray]:
    """LSE metrics [heads] of `b` against `a`."""
    drift = (b.dataset["lse"].values.astype(float) - a.dataset["lse"].values).reshape(-1, a.queries)
    return {
        "drift": drift.mean(1),
        "drift_std": drift.std(1),
        "drift_p99": stats.quantile(np.abs(drift), 0.99),
        "mass_error_p99": stats.quantile(np.abs(np.expm1(drift)), 0.99),
    }


def _check(conditions: Mapping[str, Sequence[AttentionTrace]], density: float) -> None:
    check_mapping(conditions=conditions)
    if len(conditions) < 2:
        raise LensError(f"stability compares at least two conditions, got {len(conditions)}")
    if not (is_number(density) and 0 < density < 1):
        raise LensError(f"density must lie between 0 and 1, got {density}")
    counts = {name: len(traces) for name, traces in conditions.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise LensError(f"conditions must have equally many traces, at least one; got {counts}")
    for traces in zip(*conditions.values(), strict=True):
        for trace in traces:
            if "block_mass" not in trace.dataset:
                raise LensError("a trace has no block_mass; capture it with statistics='all'")
        sizes = {
            (
                trace.part,
                trace.layers,
                trace.heads,
                trace.queries,
                trace.length,
                trace.attrs["block_size"],
            )
            for trace in traces
        }
        if len(sizes) > 1:
            raise LensError(
                "paired traces must have the same layers, heads, tokens and block size, got "
                f"{sorted(sizes)}; for several lengths use lens.traces.variance"
            )
