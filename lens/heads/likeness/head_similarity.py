"""`HeadSimilarity`: every head compared with every other one, its clusters and how redundant each head is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lens import stats
from lens.common.checked import checked
from lens.common.choices import Count
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId, head_columns, head_id
from lens.common.results import Result, Sentence
from lens.heads.likeness.redundancy import HeadClusters, clusters, redundancy
from lens.stats.intervals import around
from lens.stats.verdicts import of_many_told

Likeness = Literal["js", "log_odds", "cka"]
SIMILARITIES = {
    "js": "Jensen-Shannon divergence of attention (nats)",
    "log_odds": "cosine of attention log-odds",
    "cka": "CKA of head outputs",
}
_LARGEST = 1 << 22  # resampled numbers that are in memory at a time


@dataclass(frozen=True, repr=False, eq=False)
class HeadSimilarity(Result):
    """Every head compared with every other one; heads of all layers in one row, as in `names`.

    Attributes:
        sums, counts: [prompt, head, head], what each prompt adds. "js": sum over queries of the
            divergence, and the number of queries. "log_odds" and "cka": inner products, and 1.
        method: "js", "log_odds" or "cka".
        sink_excluded: whether the first key (and a learned sink) was left out and rows renormalised.
        exactness: "exact", or "lower bound" where only block maps were compared.
        floor: [head, head], the same value between a head on one prompt and a head on the next: what
            position, mask and sinks alone make alike. None if it was not measured.
        heads: what the rows are; model: its name.
    """

    sums: np.ndarray
    counts: np.ndarray
    method: str
    sink_excluded: bool
    exactness: str
    heads: tuple[HeadId, ...]
    model: str
    floor: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.sums)

    @property
    def names(self) -> list[str]:
        """`L0H0`, `L0H1`, ... in the order of the rows."""
        return [str(head) for head in self.heads]

    @property
    def values(self) -> np.ndarray:
        """[head, head]: divergence in nats ("js", 0 = the same), or cosine ("log_odds", "cka").

        NaN where a head has nothing to compare: an output that is the same at every position.
        """
        sums = self.sums.sum(0)
        if self.method == "js":
            return ratio(sums, self.counts.sum(0))
        own = np.diagonal(sums)
        return cosine(sums, own, own)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest that a value can be."""
        return (0, float(np.log(2))) if self.method == "js" else (-1, 1)

    @property
    def distances(self) -> np.ndarray:
        """[head, head] for clustering, Euclidean: root of the divergence, or of twice `1 - cosine`."""
        return self.distances_of(self.values)

    @property
    def closeness(self) -> np.ndarray:
        """[head, head], 1 = the same: `1 - JS / ln 2`, or the cosine."""
        return self.closeness_of(self.values)

    def resampled(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """`resamples` times the values of the pairs above the diagonal, row by row, on prompts drawn again.

        Raises:
            LensError: a single prompt, or no resample.
        """
        if self.n < 2:
            raise LensError("one prompt cannot be resampled; compare the heads on several")
        weights = stats.draws(self.n, seed, resamples)
        pairs = np.triu_indices(len(self.names), 1)
        step = max(1, _LARGEST // len(pairs[0]))
        parts = (weights[start : start + step] for start in range(0, resamples, step))
        return (values for part in parts for values in self._of_pairs(part, *pairs))

    @checked
    def interval(self, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end [head, head] of the 95 % interval over prompts; NaN for one."""
        ends = np.full((2, *self.sums.shape[1:]), np.nan)
        if self.n > 1:
            weights, values, (least, most) = stats.draws(self.n, seed), self.values, self.bounds
            rows, columns = np.triu_indices(len(self.names))
            step = max(1, _LARGEST // len(weights))
            for start in range(0, len(rows), step):
                a, b = rows[start : start + step], columns[start : start + step]
                drawn = self._of_pairs(weights, a, b)
                found = around(values[a, b], drawn, self.n, least=least, most=most)
                ends[:, a, b] = ends[:, b, a] = found
        return ends[0], ends[1]

    def _of_pairs(self, weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """[draw, pair] values of heads `a` and `b` on prompts weighed by [draw, prompt]."""
        sums = weights @ self.sums[:, a, b]
        if self.method == "js":
            return ratio(sums, weights @ self.counts[:, a, b])
        own = weights @ np.diagonal(self.sums, axis1=1, axis2=2)
        norm = np.sqrt(np.where(own > 0, own, np.nan))
        return sums / (norm[:, a] * norm[:, b])

    @checked
    def neighbours(self, head: AnyHead, count: Count = 5) -> pd.DataFrame:
        """The heads most like one head: columns `name`, `layer`, `head`, `value`, `low`,
        `high`, `n`, closest first.

        Raises:
            LensError: not a head of this model, or a number of heads that is none.
        """
        found = head_id(head)
        if found not in self.heads:
            raise LensError(f"there is no {found} among the compared heads of {self.model}")
        row = self.heads.index(found)
        low, high = self.interval()
        table = pd.DataFrame(
            {
                **head_columns(self.heads),
                "value": self.values[row],
                "low": low[row],
                "high": high[row],
                "n": self.n,
            }
        )
        order = np.argsort(self.distances[row], kind="stable")
        return table.iloc[order[order != row][:count]].reset_index(drop=True)

    @checked
    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per pair: `first`, `second`, `value`, `low`, `high`, `floor`, `n`; closest first."""
        low, high = self.interval(seed=seed)
        a, b = np.triu_indices(len(self.names), 1)
        floor = np.full(low.shape, np.nan) if self.floor is None else self.floor
        names = np.array(self.names)
        table = pd.DataFrame(
            {
                "first": names[a],
                "second": names[b],
                "value": self.values[a, b],
                "low": low[a, b],
                "high": high[a, b],
                "floor": (floor[a, b] + floor[b, a]) / 2,
                "n": self.n,
            }
        )
        order = np.argsort(self.distances[a, b], kind="stable")
        return table.iloc[order].reset_index(drop=True)

    def distances_of(self, values: np.ndarray) -> np.ndarray:
        """`distances` of other values, such as resampled ones."""
        return np.sqrt((values if self.method == "js" else 2 - 2 * values).clip(0))

    def closeness_of(self, values: np.ndarray) -> np.ndarray:
        """`closeness` of other values, such as resampled ones."""
        return 1 - values / np.log(2) if self.method == "js" else values

    @checked
    def clusters(
        self, *, count: int | None = None, resamples: int = 200, seed: int = 0
    ) -> HeadClusters:
        """Heads grouped by Ward's method, whether there are groups at all, and how stable they are on prompts drawn again.

        Args:
            count: clusters; None: of 2 to 12 the number that stands out most beside single clouds of heads (`lens.stats.grouping`).
            resamples: draws for the stability.
            seed: of the draws.

        Raises:
            LensError: heads that were not scored, a count that the model has not, or no resamples.
        """
        return clusters(self, count=count, resamples=resamples, seed=seed)

    @checked
    def redundancy(self, *, resamples: int = 300, seed: int = 0) -> pd.DataFrame:
        """How replaceable each head looks: one row per head, most redundant first.

        Columns: `name`, `layer`, `head`; `value`, the closeness to the head most like it (1 = there is
        another one that does the same; `1 - JS / ln 2`, or the cosine); `low`, `high`, 95 % bootstrap
        interval over prompts; `nearest`, that head; `floor`, the closeness of the two across prompts;
        `above_floor`, `(value - floor) / (1 - floor)`, 0 = no more alike than on different prompts; `n`.
        The floor is NaN where it was not measured. A head that was not scored has NaN.

        Redundant is not useless: of two heads alike one may go, not both. `lens.heads.pruning.curve` says
        what really happens.

        Raises:
            LensError: no resamples.
        """
        return redundancy(self, resamples=resamples, seed=seed)

    @checked
    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """The two heads that are most alike, beside the same two across prompts and the median pair ("closest")."""
        table = self.table(seed=seed).dropna(subset="value")
        if table.empty:
            return ()
        row = table.iloc[0]
        least, most = self.bounds
        closest = of_many_told(
            row, "value", ".3g", len(table), self.n, plain=True, least=least, most=most
        )
        across = "" if np.isnan(row["floor"]) else f", across different prompts {row['floor']:.3g}"
        return (
            Sentence(
                f"Of {len(table)} pairs {row['first']} is closest to {row['second']}: {SIMILARITIES[self.method]}{self._how} "
                f"{closest}{across}, the median pair {table['value'].median():.3g} (n = {self.n}).",
                kind="closest",
            ),
        )

    @property
    def _how(self) -> str:
        """What is to be known of the values, in words."""
        without = ", sink excluded" if self.sink_excluded else ""
        return without + ("" if self.exactness == "exact" else f", {self.exactness} by block maps")

    def __repr__(self) -> str:
        closest = ""
        for nearest in self.table()[:1].to_dict("records"):  # none of a model with one head
            closest = (
                f"; closest {nearest['first']} and {nearest['second']}, {nearest['value']:.3g}"
            )
        return (
            f"HeadSimilarity({SIMILARITIES[self.method]}{self._how}; {self.model}, "
            f"{len(self.names)} head{'s' * (len(self.names) > 1)}, {self.n} prompts{closest})"
        )


def ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`sums / counts`, NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def cosine(sums: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`sums / sqrt(own other)`, NaN where a head's product with itself is not positive."""
    left, right = (np.sqrt(np.where(one > 0, one, np.nan)) for one in (own, other))
    return sums / np.outer(left, right)
