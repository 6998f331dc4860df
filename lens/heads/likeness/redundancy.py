"""Clusters of heads that are alike, how stable they are, and how redundant each head is.

>>> similar = lens.heads.similarity(model, texts, method="js")
>>> similar.clusters().table()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

from lens import stats
from lens.common.choices import check_counts, is_whole
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence
from lens.stats.grouping import Groups, grouped


class _Compared(Protocol):
    """What is needed of `HeadSimilarity`, whose methods these functions are."""

    @property
    def method(self) -> str: ...
    @property
    def heads(self) -> tuple[HeadId, ...]: ...
    @property
    def model(self) -> str: ...
    @property
    def floor(self) -> np.ndarray | None: ...
    @property
    def n(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def distances(self) -> np.ndarray: ...
    @property
    def closeness(self) -> np.ndarray: ...
    def resampled(self, resamples: int, seed: int) -> Iterator[np.ndarray]: ...
    def distances_of(self, values: np.ndarray) -> np.ndarray: ...
    def closeness_of(self, values: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, repr=False, eq=False)
class HeadClusters(Result):
    """Heads grouped by Ward's method (`lens.stats.grouping`).

    Attributes:
        labels: [head] int, number of the cluster; clusters are numbered by size, the largest first.
        merges: [heads - 1, 3], the tree: the two parts and the distance at which they merge; part k
            below the number of heads is that head, above it the merge `k - heads`.
        cut: distance at which the tree was cut: halfway between the last merge kept and the next.
        order: [head], heads such that every part of the tree stands together.
        stability: [head], share of a head's cluster-mates that it keeps when prompts are drawn
            again, mean over draws; NaN for a head alone, and for a single prompt.
        rand: [draw], adjusted Rand index of the clusters of each draw with these; 1 = the same
            groups, 0 = as by chance (Hubert and Arabie 1985). Empty for a single prompt.
        silhouette: of the clusters, as `lens.stats.grouping` has it: heads in clusters below 5 % of all count 0 and are nobody's
            neighbours.
        groups: the same with what the count was chosen by, and beside single clouds.
        medoids: prototype of each cluster: the head with the smallest mean distance to the others.
        names: of the heads; method, model: what was compared.
    """

    cut: float
    order: np.ndarray
    stability: np.ndarray
    rand: np.ndarray
    groups: Groups
    medoids: tuple[HeadId, ...]
    names: tuple[str, ...]
    method: str
    model: str

    @property
    def labels(self) -> np.ndarray:
        """[head], number of the cluster, the largest first."""
        return self.groups.labels

    @property
    def merges(self) -> np.ndarray:
        """[heads - 1, 3], the tree."""
        return self.groups.merges

    @property
    def silhouette(self) -> float:
        """Of the clusters."""
        return self.groups.silhouette

    @property
    def members(self) -> list[list[str]]:
        """Names of the heads of each cluster."""
        return [
            [self.names[head] for head in np.flatnonzero(self.labels == label)]
            for label in range(len(self.medoids))
        ]

    def table(self) -> pd.DataFrame:
        """One row per cluster: `cluster`, `size`, `prototype`, `heads`, `stability`."""
        rows = [
            (
                label,
                len(heads),
                str(self.medoids[label]),
                " ".join(heads),
                float(self.stability[self.labels == label].mean()),
            )
            for label, heads in enumerate(self.members)
        ]
        return pd.DataFrame(rows, columns=["cluster", "size", "prototype", "heads", "stability"])

    def findings(self) -> tuple[Sentence, ...]:
        """The groups, or that there are none ("groups")."""
        several = [heads for heads in self.members if len(heads) > 1]
        shown = "; ".join(" ".join(heads[:6]) for heads in several[:3]) or "no two heads"
        prompts = ""
        if len(self.rand):
            prompts = f"; adjusted Rand {self.rand.mean():.2f} on prompts drawn again"
        if self.groups.apart:
            text = f"{shown} ({len(self.members)} groups; {self.groups.in_words}{prompts})."
        else:
            text = f"no groups are told apart ({self.groups.in_words}); cut into {len(self.members)}, the largest are {shown}."
        return (Sentence(text, kind="groups"),)

    def __repr__(self) -> str:
        several = [heads for heads in self.members if len(heads) > 1]
        shown = "; ".join("+".join(heads) for heads in several[:4]) or "every head alone"
        rand = f", adjusted Rand {self.rand.mean():.2f} over draws" if len(self.rand) else ""
        return (
            f"HeadClusters({len(self.members)} of {len(self.names)} heads by {self.method}, "
            f"{self.model}: {shown}{rand})"
        )


def clusters(
    similarity: _Compared, *, count: int | None = None, resamples: int = 200, seed: int = 0
) -> HeadClusters:
    """See `HeadSimilarity.clusters`."""
    distances = similarity.distances
    heads = len(distances)
    names = similarity.names
    if unscored := [names[head] for head in np.flatnonzero(np.isnan(distances.diagonal()))]:
        raise LensError(
            f"{', '.join(unscored)} has nothing to compare (an output that is the same everywhere), "
            "so it is in no cluster; use method='js'"
        )
    if heads < 3:
        raise LensError(f"clusters need at least 3 heads, {similarity.model} has {heads}")
    if count is not None and not (is_whole(count) and 1 <= count <= heads):
        raise LensError(f"count must be 1 to {heads}, the number of heads, got {count}")
    check_counts(resamples=resamples)
    found = grouped(distances, count=count, seed=seed)
    labels, merges, count = found.labels, found.merges, found.count
    stability, rand = _again(similarity, labels, count, resamples, seed)
    medoids = []
    for label in range(count):
        inside = np.flatnonzero(labels == label)
        best = inside[distances[np.ix_(inside, inside)].sum(1).argmin()]
        medoids.append(similarity.heads[best])
    heights = np.concatenate([[0.0], merges[:, 2], [merges[-1, 2] * 1.05]])
    return HeadClusters(
        cut=float(heights[heads - count : heads - count + 2].mean()),
        order=_leaves(merges),
        stability=stability,
        rand=rand,
        groups=found,
        medoids=tuple(medoids),
        names=tuple(names),
        method=similarity.method,
        model=similarity.model,
    )


def redundancy(similarity: _Compared, *, resamples: int = 300, seed: int = 0) -> pd.DataFrame:
    """See `HeadSimilarity.redundancy`."""
    check_counts(resamples=resamples)
    closeness = similarity.closeness
    heads = len(closeness)
    value, nearest = _nearest(closeness)
    low = high = np.full(heads, np.nan)
    if similarity.n > 1 and heads > 1:
        pairs = np.triu_indices(heads, 1)
        again = np.full((heads, heads), np.nan)
        drawn = []
        for values in similarity.resampled(resamples, seed):
            again[pairs] = again.T[pairs] = similarity.closeness_of(values)
            drawn.append(_nearest(again)[0])
        low, high = stats.interval(drawn)
    floor = np.full(heads, np.nan)
    if similarity.floor is not None:
        both = similarity.closeness_of((similarity.floor + similarity.floor.T) / 2)
        floor = both[np.arange(heads), nearest]
    names = np.array(similarity.names)
    table = pd.DataFrame(
        {
            **head_columns(similarity.heads),
            "value": value,
            "low": low,
            "high": high,
            "nearest": np.where(np.isnan(value), "", names[nearest]),
            "floor": floor,
            "above_floor": (value - floor) / np.where(floor < 1, 1 - floor, np.nan),
            "n": similarity.n,
        }
    )
    return table.sort_values("value", ascending=False, kind="stable", ignore_index=True)


def _again(
    similarity: _Compared, labels: np.ndarray, count: int, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stability [head] and adjusted Rand [draw] of the clusters on prompts drawn again."""
    heads = len(labels)
    if similarity.n < 2:
        return np.full(heads, np.nan), np.empty(0)
    together = labels[:, None] == labels
    np.fill_diagonal(together, False)
    mates = together.sum(1)
    kept, rand = np.zeros(heads), []
    for values in similarity.resampled(resamples, seed):
        distances = similarity.distances_of(values)
        if np.isnan(distances).any():  # a head has nothing to compare on these prompts
            continue
        again = stats.cut_tree(stats.ward_tree(distances), count)
        kept += (together & (again[:, None] == again)).sum(1)
        rand.append(stats.adjusted_rand(labels, again))
    stability = kept / np.where(mates, mates, np.nan) / (len(rand) or np.nan)
    return stability, np.array(rand)


def _nearest(closeness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Closeness to the head most like each, and its number; NaN where nothing was scored."""
    others = np.where(np.isnan(closeness), -np.inf, closeness)
    np.fill_diagonal(others, -np.inf)
    nearest = others.argmax(1)
    value = others[np.arange(len(others)), nearest]
    return np.where(np.isinf(value), np.nan, value), nearest


def _leaves(merges: np.ndarray) -> np.ndarray:
    """Heads in the order in which the tree is drawn."""
    heads = len(merges) + 1
    below = {head: [head] for head in range(heads)}
    for step, (left, right, _) in enumerate(merges):
        below[heads + step] = below.pop(int(left)) + below.pop(int(right))
    return np.array(below[2 * heads - 2])
