"""Which patterns of attention the heads of a vision model have: every map by few numbers, and these in groups.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", TVCG 2023, arXiv 2303.13731. A map is
the attention of one head on one picture, patch by patch [patches, patches] in rows from the top left on, each row as a
share of what it has on patches, times their number: uniform attention is 1 all over. Block means of it, [side, side], go
through the square root into a convolutional autoencoder with a narrow middle, whose numbers are grouped as
`lens.stats.grouping` says: Ward's method, the count that stands out most beside single clouds, and whether there are groups at all. Beside it stand as many principal components, grouped alike: what
the autoencoder finds that these do not, and how far the two groupings agree, is part of the result. A prototype is what the
middle of a group is decoded to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from lens import stats
from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence
from lens.stats.grouping import Groups, grouped
from lens.vision._autoencoder import Encoded, autoencoder, components
from lens.vision._patches import SMALLEST, grid_of, maps

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

_SIDES = (32, 16, 8)  # 64 trains twelve times as long
_MOST_MAPS = 4096  # whose distances, each to each, are kept
_NEARLY_ALL = 0.9  # share of the maps from which on one pattern says little


@dataclass(frozen=True, eq=False)
class Grouping(Result):
    """Maps by few numbers, in groups.

    Attributes:
        name: "autoencoder" or "pca".
        latent: [maps, numbers].
        missed: share of the variance of the maps that these numbers lose.
        groups: their labels, how stable they are and what they are beside single clouds.
        prototypes: [groups, side, side], square roots of multiples of uniform attention.
    """

    name: str
    latent: np.ndarray = field(repr=False)
    missed: float
    groups: Groups = field(repr=False)
    prototypes: np.ndarray = field(repr=False)

    @property
    def labels(self) -> np.ndarray:
        """[maps], number of the group, the largest first."""
        return self.groups.labels

    @property
    def places(self) -> np.ndarray:
        """[maps, 2] for a scatter: the two directions in which the numbers differ most."""
        away = self.latent - self.latent.mean(0)
        axes = np.linalg.svd(away, full_matrices=False)[2][:2]
        found = np.zeros((len(away), 2))
        found[:, : len(axes)] = away @ axes.T
        return found

    def table(self) -> pd.DataFrame:
        """One row per group: `group`, `maps`, `share`."""
        sizes = np.bincount(self.labels)
        groups = np.arange(len(sizes))
        return pd.DataFrame({"group": groups, "maps": sizes, "share": sizes / sizes.sum()})

    def __repr__(self) -> str:
        return (
            f"Grouping({self.name}: {len(self.prototypes)} groups of {len(self.labels)} maps, "
            f"{self.missed:.1%} of the variance lost)"
        )


@dataclass(frozen=True, repr=False, eq=False)
class PatternSummary(Result):
    """The patterns of all heads on all pictures.

    Attributes:
        found: by the autoencoder.
        baseline: by as many principal components.
        picture, layer, head: [maps] of each map.
        side: of the maps, after block means.
    """

    found: Grouping
    baseline: Grouping
    picture: np.ndarray = field(repr=False)
    layer: np.ndarray = field(repr=False)
    head: np.ndarray = field(repr=False)
    side: int

    @property
    def agreement(self) -> float:
        """Adjusted Rand index of the two groupings: 1 the same, 0 as by chance."""
        return stats.adjusted_rand(self.found.labels, self.baseline.labels)

    def table(self) -> pd.DataFrame:
        """One row per map: `picture` (its number), `layer`, `head`, `name`, `group`, `x`, `y`, and of the principal
        components `group_pca`, `x_pca`, `y_pca`."""
        found: dict[str, object] = {"picture": self.picture}
        found |= head_columns(list(zip(self.layer.tolist(), self.head.tolist(), strict=True)))
        for end, one in (("", self.found), ("_pca", self.baseline)):
            found[f"group{end}"] = one.labels
            found[f"x{end}"], found[f"y{end}"] = one.places.T
        return pd.DataFrame(found)

    def heads(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `group` (that most of its maps are in), `share` of them, and a
        column `group_<number>` for each group with its share."""
        rows = self.table()
        count = len(self.found.prototypes)
        shares = {
            f"group_{group}": (rows["group"] == group).groupby([rows["layer"], rows["head"]]).mean()
            for group in range(count)
        }
        wide = pd.DataFrame(shares)
        places = list(wide.index)
        top = wide.to_numpy()
        return pd.DataFrame(
            {
                **head_columns(places),
                "group": top.argmax(1),
                "share": top.max(1),
                **{name: wide[name].to_numpy() for name in wide},
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """The groups and their stability ("groups"), what stands beside ("baseline"), and how constant heads are ("heads")."""
        own, other = self.found, self.baseline
        heads = self.heads()
        sizes = ", ".join(f"{share:.0%}" for share in own.table()["share"][:4])
        largest = float(own.table()["share"].max())
        alone = (
            f" One holds {largest:.0%}: these groups tell few maps apart."
            if largest > _NEARLY_ALL
            else ""
        )
        fall = (
            f"fall into {len(own.prototypes)} patterns, the largest with {sizes} of them"
            if own.groups.apart
            else f"are in no groups that are told apart; cut into {len(own.prototypes)}, the largest have {sizes} of them"
        )
        found = [
            Sentence(
                f"{len(own.labels)} maps {fall} ({own.groups.in_words}).{alone}", kind="groups"
            ),
            Sentence(
                f"The autoencoder loses {own.missed:.1%} of the variance of the maps, as many principal components "
                f"({own.latent.shape[1]}) lose {other.missed:.1%}; these make {len(other.prototypes)} groups "
                f"({other.groups.in_words}), which agree with the others to {self.agreement:.2f}.",
                kind="baseline",
            ),
        ]
        if len(np.unique(self.picture)) > 1:
            constant, pictures = int((heads["share"] == 1).sum()), len(np.unique(self.picture))
            chance = (own.table()["share"].to_numpy() ** pictures).sum() * len(heads)
            found.append(
                Sentence(
                    f"{constant} of {len(heads)} heads keep one pattern on all {pictures} pictures ({chance:.1f} by chance, "
                    "by the sizes of the patterns).",
                    kind="heads",
                )
            )
        return tuple(found)


def patterns(
    traces: AttentionTrace | Sequence[AttentionTrace],
    *,
    count: int | None = None,
    size: Count = 16,
    steps: Count = 300,
    draws: Count = 20,
    seed: Seed = 0,
    progress: bool = True,
) -> PatternSummary:
    """Summarise the attention of all heads on pictures: an autoencoder, principal components beside it, groups of both.

    Args:
        traces: of pictures through one model, with q and k (`keep_qk`); one or several.
        count: of the groups; None: of 2 to 12 the one that stands out most beside single clouds (`lens.stats.grouping`).
        size: numbers that a map is summarised by.
        steps: of the training, each on at most 256 maps.
        draws: of 80 % of the maps, grouped again.
        seed: of the training and the draws.
        progress: show a bar.

    Raises:
        LensError: no picture, traces of several models, fewer than 4 maps or more than 4,096, or no exact tiles.

    Reference:
        arXiv 2303.13731, the summary of attention patterns.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> lens.vision.patterns(trace, steps=20, progress=False).heads()["name"].tolist()[:2]
        ['L0H0', 'L0H1']
    """
    several = given_traces(traces)
    if len({(one.model, one.layers, one.heads) for one in several}) > 1:
        raise LensError("traces must come from one model; summarise them apart")
    grids = [grid_of(trace) for trace in several]
    of_each = len(several[0].layers) * several[0].heads
    total = of_each * len(several)
    if not 4 <= total <= _MOST_MAPS:
        raise LensError(
            f"4 to {_MOST_MAPS:,} maps are summarised, got {total:,} ({len(several)} pictures of {of_each} heads); "
            "give more or fewer pictures"
        )
    if count is not None and not 2 <= count < total:
        raise LensError(f"count must be 2 to {total - 1}, the maps less one, got {count}")
    patches = min(grid.height * grid.width for grid in grids)
    side = next((one for one in _SIDES if one <= patches), _SIDES[-1])
    pooled, picture, layer, head = [], [], [], []
    for number, (trace, grid) in enumerate(zip(several, grids, strict=True)):
        rows = np.argsort(grid.order)  # positions, patch by patch from the top left on
        for name, one in maps(trace, grid):
            pooled.append(_pooled(one[np.ix_(rows, rows)], side))
            picture.append(number)
            layer.append(name.layer)
            head.append(name.head)
    given = np.sqrt(np.stack(pooled))
    size = min(size, total - 1)
    ways = {
        "autoencoder": autoencoder(given, size, steps, seed, progress),
        "pca": components(given, size),
    }
    found, baseline = (_grouped(name, one, count, draws, seed) for name, one in ways.items())
    return PatternSummary(found, baseline, *map(np.array, (picture, layer, head)), side=side)


def _pooled(one: np.ndarray, side: int) -> np.ndarray:
    """[side, side] block means of rows as multiples of uniform attention; smaller maps are stretched."""
    total = one.sum(-1, keepdims=True)
    share = np.where(total > SMALLEST, one / np.where(total > SMALLEST, total, 1), 1 / len(one))
    weights = _overlaps(len(one), side)
    return len(one) * weights @ share @ weights.T


def _overlaps(length: int, parts: int) -> np.ndarray:
    """[parts, length]: means over equal parts of a line, of cells that lie in a part by as much of them as does."""
    edges = np.linspace(0, length, parts + 1)
    cells = np.arange(length)
    inside = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return inside.clip(0) / (length / parts)


def _grouped(name: str, one: Encoded, count: int | None, draws: int, seed: int) -> Grouping:
    latent = one.latent
    groups = grouped(cdist(latent, latent), count=count, draws=draws, seed=seed)
    middles = [latent[groups.labels == group].mean(0) for group in range(groups.count)]
    prototypes = np.maximum(one.decode(np.stack(middles)), 0)
    return Grouping(name, latent, one.missed, groups, prototypes)
