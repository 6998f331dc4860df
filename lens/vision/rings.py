"""How strongly patches attend to their spatial neighbours: rings, rows, columns, windows, and how that adds up.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", TVCG 2023, arXiv 2303.13731. The
k-hop ring of a patch p are the patches at Chebyshev distance k, N_k(p); at the border it is cut, and then smaller than 8 k:

    S_k(p) = sum over q in N_k(p) of P[p, q],        W_k(p) = S_k(p) / |N_k(p)|,

mean over the patches that have such a ring. Sum over k of S_k and the mass elsewhere ([CLS], registers, text) is 1, and
uniform attention has W_k = 1 / keys for every k.

Shapes are sets of patches that efficient vision transformers restrict attention to: the own row or column (axial
attention), both (criss-cross; CCNet, arXiv 1811.11721), a window of w × w (Swin, arXiv 2103.14030), every d-th row and
column from the patch on (dilated, grid attention of MaxViT, arXiv 2204.01697). A share is of the mass on patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import Count, Seed
from lens.common.head_ids import all_heads
from lens.common.results import Result, Sentence, ends
from lens.stats import over_rows
from lens.stats.verdicts import of_many
from lens.vision._patches import (
    SMALLEST,
    grid_of,
    head_table,
    in_words,
    maps,
    of_uniform,
    offsets,
    over_heads,
)

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

_DIGITS = 6  # of a change of mass: single precision is no finding
SHAPES = ("row", "column", "criss_cross", "window", "dilated")


@dataclass(frozen=True, repr=False, eq=False)
class Rings(Result):
    """Mass by ring.

    Attributes:
        mass, low, high: [layers, heads, rings] S_k, mean over patches, with its 95 % interval over patches.
        weight: [layers, heads, rings] W_k.
        elsewhere: [layers, heads] mass of patches on what is no patch.
        near_low: [layers, heads] low end of the interval of the mass on the patch itself and its 8 neighbours.
        near: [layers, 3] that mass, mean over heads, with its interval over patches.
        change: low and high end of what it has in the last layer over the first, patch by patch.
        uniform, uniform_weight: [layers, rings] S_k and W_k of uniform attention over the keys that each patch sees.
        layers: numbers of the layers.
        grid: (height, width) in patches.
    """

    mass: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)
    elsewhere: np.ndarray = field(repr=False)
    near_low: np.ndarray = field(repr=False)
    near: np.ndarray = field(repr=False)
    change: tuple[float, float]
    uniform: np.ndarray = field(repr=False)
    uniform_weight: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    grid: tuple[int, int]

    def table(self) -> pd.DataFrame:
        """One row per head and ring: `layer`, `head`, `name`, `ring`, `mass` with `_low` and `_high`, `weight`,
        `elsewhere`, and `uniform_mass`, `uniform_weight`."""
        shape = self.mass.shape
        columns = {
            "ring": np.arange(shape[2]),
            "mass": self.mass,
            "mass_low": self.low,
            "mass_high": self.high,
            "weight": self.weight,
            "elsewhere": self.elsewhere[..., None],
            "uniform_mass": self.uniform[:, None],
            "uniform_weight": self.uniform_weight[:, None],
        }
        return head_table(
            self.layers, {name: np.broadcast_to(one, shape) for name, one in columns.items()}
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads look at their direct neighbours more than uniform attention does ("near"), and how that
        changes over the layers, as far as intervals tell it ("trend")."""
        fair = self.uniform[:, :2].sum(-1)
        above = self.near_low > fair[:, None] + SMALLEST
        (first, low, high), (last, least, most) = self.near[[0, -1]]
        fallen, risen = self.change
        goes = "rises" if fallen > 0 else "falls" if risen < 0 else "is not told to change"
        height, width = self.grid
        return (
            Sentence(
                f"On {height} × {width} patches {int(above.sum())} of {above.size} heads put more on the patch itself "
                f"and its 8 neighbours than uniform attention ({in_words(fair, '.1%')}), their intervals above it.",
                kind="near",
            ),
            Sentence(
                f"Mass on the patch and its neighbours {goes} from layer {self.layers[0]}, {first:.1%} [{low:.1%}, "
                f"{high:.1%}], to layer {self.layers[-1]}, {last:.1%} [{least:.1%}, {most:.1%}] (mean over heads, over the patches of one picture).",
                kind="trend",
            ),
        )


def rings(trace: AttentionTrace, *, image: int = 0, seed: Seed = 0) -> Rings:
    """How much each head puts on every ring round a patch.

    Args:
        trace: of a picture, with q and k (`keep_qk`).
        image: number of the picture or tile.
        seed: of the intervals over patches.

    Raises:
        LensError: no picture, no known patches, more than 4,096 of them, or no exact tiles.

    Reference:
        arXiv 2303.13731, the measure of attention strength.

    Example:
        >>> lens.vision.rings(lens.capture(vit, {"pixel_values": images}, keep_qk=True)).findings()
    """
    grid = grid_of(trace, image)
    away = np.abs(offsets(grid)).max(0)
    patches, count = len(away), int(away.max()) + 1
    place = (np.arange(patches)[:, None] * count + away).ravel()  # whose ring, and which

    def by_ring(weights: np.ndarray | None = None) -> np.ndarray:
        """[rings, patches] sums; members without weights."""
        found = np.bincount(place, weights, patches * count)
        return found.reshape(patches, count).T

    sizes = by_ring()
    there = np.where(sizes > 0, sizes, np.nan)

    def measured(one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[rings, patches] masses; [rings] weights."""
        sums = by_ring(one.ravel())
        return sums, np.nanmean(sums / there, -1)

    mass, weight, elsewhere = [], [], []
    for _, one in maps(trace, grid):
        sums, mean = measured(one)
        mass.append(sums)
        weight.append(mean)
        elsewhere.append(1 - one.sum(-1).mean())
    by_patch = over_heads(trace, mass)
    low, high = over_rows(by_patch, seed)
    by_head = by_patch[:, :, :2].sum(2)  # [layers, heads, patches]
    near = by_head.mean(1)
    change = over_rows(np.round(near[-1:] - near[:1], _DIGITS), seed)
    even = of_uniform(
        trace, grid.span, lambda one: [part.reshape(count, -1).mean(-1) for part in measured(one)]
    )
    return Rings(
        mass=by_patch.mean(-1),
        low=low,
        high=high,
        weight=over_heads(trace, weight),
        elsewhere=over_heads(trace, elsewhere),
        near_low=over_rows(by_head, seed)[0],
        change=(float(change[0][0]), float(change[1][0])),
        near=np.stack([near.mean(-1), *over_rows(near, seed)], -1),
        uniform=even[:, 0],
        uniform_weight=even[:, 1],
        layers=trace.layers,
        grid=(grid.height, grid.width),
    )


@dataclass(frozen=True, repr=False, eq=False)
class Shapes(Result):
    """Share of the mass on patches that lies in each of `SHAPES`.

    Attributes:
        share, low, high: [layers, heads, shapes] with 95 % interval over patches.
        uniform: [layers, shapes] of uniform attention over the keys that each patch sees.
        window, step: sides of a window in patches, and of the dilated grid.
        layers: numbers of the layers.
    """

    share: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    uniform: np.ndarray = field(repr=False)
    window: int
    step: int
    layers: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, and each shape with `_low`, `_high` and `_uniform`."""
        columns = {}
        for number, shape in enumerate(SHAPES):
            columns |= {
                shape: self.share[..., number],
                f"{shape}_low": self.low[..., number],
                f"{shape}_high": self.high[..., number],
                f"{shape}_uniform": np.repeat(
                    self.uniform[:, number, None], self.share.shape[1], 1
                ),
            }
        return head_table(self.layers, columns)

    def findings(self) -> tuple[Sentence, ...]:
        """Of each shape how many heads put more there than uniform attention, and which most, its interval as one of many."""
        found = []
        names = all_heads(self.layers, self.share.shape[1])
        for number, shape in enumerate(SHAPES):
            share, fair = self.share[..., number].ravel(), self.uniform[:, number]
            above = int((self.low[..., number] > fair[:, None] + SMALLEST).sum())
            best = int(np.nanargmax(share))
            low, high = (one[..., number].ravel()[best] for one in (self.low, self.high))
            low, high = of_many(share[best], low, high, share.size, 0, least=0, most=1)
            found.append(
                Sentence(
                    f"{shape.replace('_', '-')}: {above} of {share.size} heads above uniform attention ({in_words(fair, '.1%')}); "
                    f"most {names[best]} with {share[best]:.1%}{ends(low, high, '.1%')}.",
                    kind=shape,
                )
            )
        return tuple(found)


def shapes(
    trace: AttentionTrace, *, window: Count = 4, step: Count = 2, image: int = 0, seed: Seed = 0
) -> Shapes:
    """How much of its attention on patches each head keeps in its row, column, both, window, or dilated grid.

    Args:
        trace: of a picture, with q and k (`keep_qk`).
        window: side of the windows in patches, cut from the top left corner on.
        step: of the dilated grid: every `step`-th row and column from the patch on.
        image, seed: as of `rings`.

    Raises:
        LensError: as `rings`; a window or step below 1.

    Example:
        >>> lens.vision.shapes(lens.capture(vit, {"pixel_values": images}, keep_qk=True), window=2).table()
    """
    grid = grid_of(trace, image)
    down, across = offsets(grid)
    row, column = np.divmod(grid.order, grid.width)
    boxes = (row // window) * grid.width + column // window
    members = np.stack(
        [
            down == 0,
            across == 0,
            (down == 0) | (across == 0),
            boxes[:, None] == boxes,
            (down % step == 0) & (across % step == 0),
        ]
    )

    def shares(one: np.ndarray) -> np.ndarray:
        total = one.sum(-1)
        return np.einsum("kpq,pq->kp", members, one) / np.where(total > SMALLEST, total, np.nan)

    by_patch = over_heads(trace, [shares(one) for _, one in maps(trace, grid)])
    low, high = over_rows(by_patch, seed)
    even = of_uniform(trace, grid.span, lambda one: np.nanmean(shares(one), -1))
    return Shapes(np.nanmean(by_patch, -1), low, high, even, window, step, trace.layers)
