"""How strongly patches attend to their spatial neighbours: rings, rows, columns, windows, and how that adds up.

Li et al., "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", TVCG 2023, arXiv 2303.13731. The
k-hop ring of a patch p are the patches at Chebyshev distance k, N_k(p); at the border it is cut, and then smaller than 8 k:

    S_k(p) = sum over q in N_k(p) of P[p, q],        W_k(p) = S_k(p) / |N_k(p)|,

mean over the patches that have such a ring. Sum over k of S_k and the mass elsewhere ([CLS], registers, text) is 1, and
uniform attention has W_k = 1 / keys for every k.

Shapes are sets of patches that efficient vision transformers restrict attention to: the own row or column (axial
attention), both (criss-cross; CCNet, arXiv 1811.11721), a window of w × w (Swin, arXiv 2103.14030), every d-th row and
column from the patch on (dilated, grid attention of MaxViT, arXiv 2204.01697). A share is of the mass on patches.

The receptive field follows attention through the layers: R_0 = I, R_l = normalised (A_l + I) R_(l-1) with A_l the mean
of the heads (rollout, Abnar & Zuidema 2020, arXiv 2005.00928). It is what could have been looked at, not what was used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import check_counts
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, described
from lens.stats import over_rows
from lens.vision._patches import SMALLEST, grid_of, head_table, maps, offsets, over_heads

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

_DIGITS = 4  # of distances in patches: single precision is no finding
SHAPES = ("row", "column", "criss_cross", "window", "dilated")


@dataclass(frozen=True, eq=False)
class Rings(Result):
    """Mass by ring.

    Attributes:
        mass, low, high: [layers, heads, rings] S_k, mean over patches, with its 95 % interval over patches.
        weight: [layers, heads, rings] W_k.
        elsewhere: [layers, heads] mass of patches on what is no patch.
        near: [layers, 3] mass on the patch itself and its 8 neighbours, mean over heads, with its interval over patches.
        uniform: [rings] S_k of uniform attention over the keys.
        keys: that a patch sees.
        layers: numbers of the layers.
        grid: (height, width) in patches.
    """

    mass: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)
    elsewhere: np.ndarray = field(repr=False)
    near: np.ndarray = field(repr=False)
    uniform: np.ndarray = field(repr=False)
    keys: int
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
            "uniform_mass": self.uniform,
            "uniform_weight": np.array(1 / self.keys),
        }
        return head_table(
            self.layers, {name: np.broadcast_to(one, shape) for name, one in columns.items()}
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads look at their direct neighbours more than uniform attention does ("near"), and how that
        changes over the layers, as far as intervals tell it ("trend")."""
        fair = float(self.uniform[:2].sum())
        above = self.low[..., :2].sum(-1) > fair + SMALLEST
        (first, low, high), (last, least, most) = self.near[[0, -1]]
        goes = (
            "is not told apart"
            if low <= most and least <= high
            else "rises"
            if last > first
            else "falls"
        )
        height, width = self.grid
        return (
            Sentence(
                f"On {height} × {width} patches {int(above.sum())} of {above.size} heads put more on the patch itself "
                f"and its 8 neighbours than uniform attention ({fair:.1%}), their intervals above it.",
                kind="near",
            ),
            Sentence(
                f"Mass on the patch and its neighbours {goes} from layer {self.layers[0]}, {first:.1%} [{low:.1%}, "
                f"{high:.1%}], to layer {self.layers[-1]}, {last:.1%} [{least:.1%}, {most:.1%}] (mean over heads).",
                kind="trend",
            ),
        )

    def __repr__(self) -> str:
        return described(self)


def rings(trace: AttentionTrace, *, image: int = 0, seed: int = 0) -> Rings:
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
    check_counts(0, seed=seed)
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
    mass, weight, elsewhere = [], [], []
    for _, one in maps(trace, grid):
        sums = by_ring(one.ravel())
        mass.append(sums)
        weight.append(np.nanmean(sums / there, -1))
        elsewhere.append(1 - one.sum(-1).mean())
    by_patch = over_heads(trace, mass)
    low, high = over_rows(by_patch, seed)
    near = by_patch[:, :, :2].sum(2).mean(1)  # [layers, patches]
    keys = trace.length
    return Rings(
        mass=by_patch.mean(-1),
        low=low,
        high=high,
        weight=over_heads(trace, weight),
        elsewhere=over_heads(trace, elsewhere),
        near=np.stack([near.mean(-1), *over_rows(near, seed)], -1),
        uniform=sizes.mean(-1) / keys,
        keys=keys,
        layers=trace.layers,
        grid=(grid.height, grid.width),
    )


@dataclass(frozen=True, eq=False)
class Shapes(Result):
    """Share of the mass on patches that lies in each of `SHAPES`.

    Attributes:
        share, low, high: [layers, heads, shapes] with 95 % interval over patches.
        uniform: [shapes] of uniform attention.
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
                f"{shape}_uniform": np.full(self.share.shape[:2], self.uniform[number]),
            }
        return head_table(self.layers, columns)

    def findings(self) -> tuple[Sentence, ...]:
        """Of each shape how many heads put more there than uniform attention, and which most."""
        found = []
        names = [
            HeadId(layer, head) for layer in self.layers for head in range(self.share.shape[1])
        ]
        for number, shape in enumerate(SHAPES):
            share, fair = self.share[..., number].ravel(), self.uniform[number]
            above = int((self.low[..., number] > fair + SMALLEST).sum())
            best = int(np.nanargmax(share))
            found.append(
                Sentence(
                    f"{shape.replace('_', '-')}: {above} of {share.size} heads above uniform attention ({fair:.1%}); "
                    f"most {names[best]} with {share[best]:.1%}.",
                    kind=shape,
                )
            )
        return tuple(found)

    def __repr__(self) -> str:
        return described(self)


def shapes(
    trace: AttentionTrace, *, window: int = 4, step: int = 2, image: int = 0, seed: int = 0
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
    check_counts(0, seed=seed)
    check_counts(window=window, step=step)
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
    found = []
    for _, one in maps(trace, grid):
        total = one.sum(-1)
        found.append(
            np.einsum("kpq,pq->kp", members, one) / np.where(total > SMALLEST, total, np.nan)
        )
    by_patch = over_heads(trace, found)
    low, high = over_rows(by_patch, seed)
    return Shapes(
        np.nanmean(by_patch, -1), low, high, members.mean((1, 2)), window, step, trace.layers
    )


@dataclass(frozen=True, eq=False)
class ReceptiveField(Result):
    """What can have reached a patch through the layers.

    Attributes:
        distance, low, high: [layers] mean distance in patches of what reaches a patch after each layer, with its 95 %
            interval over patches.
        alike: [layers] the same under uniform attention in all of these layers.
        beyond: low and high end of what the last distance has over that, patch by patch.
        half: [layers] share of the patches that holds half of it, mean over patches.
        reached: [layers, height, width] what reaches the patch in the middle.
        uniform_distance: mean distance of uniform attention over the patches.
        layers: numbers of the layers.
    """

    distance: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    alike: np.ndarray = field(repr=False)
    beyond: tuple[float, float] = field(repr=False)
    half: np.ndarray = field(repr=False)
    reached: np.ndarray = field(repr=False)
    uniform_distance: float
    layers: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row per layer: `layer`, `distance` with `_low` and `_high`, `half`, `uniform_distance`."""
        return pd.DataFrame(
            {
                "layer": self.layers,
                "distance": self.distance,
                "distance_low": self.low,
                "distance_high": self.high,
                "half": self.half,
                "uniform_distance": self.uniform_distance,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How far it reaches after the first and the last layer ("field"), and whether that is what uniform attention in
        these layers reaches ("beyond")."""
        low, high = self.beyond
        told = "farther than" if low > 0 else "nearer than" if high < 0 else "not told apart from"
        return (
            Sentence(
                f"What can have reached a patch lies {self.distance[0]:.2f} patches away on average after layer "
                f"{self.layers[0]} and {self.distance[-1]:.2f} after layer {self.layers[-1]} (all patches alike: "
                f"{self.uniform_distance:.2f}); half of it comes from {self.half[0]:.1%}, then {self.half[-1]:.1%} of "
                "the patches.",
                kind="field",
            ),
            Sentence(
                f"After layer {self.layers[-1]} that is {told} what uniform attention in all {len(self.layers)} layers reaches "
                f"({self.alike[-1]:.2f}; the difference is {low:+.2f} to {high:+.2f}).",
                kind="beyond",
            ),
        )

    def __repr__(self) -> str:
        return described(self)


def receptive_field(trace: AttentionTrace, *, image: int = 0, seed: int = 0) -> ReceptiveField:
    """From how far information can have reached a patch, layer by layer.

    All positions take part ([CLS] and registers pass on what they saw); shares are of what comes from patches.

    Args:
        trace: of a picture, with q and k (`keep_qk`).
        image: number of the picture or tile.
        seed: of the intervals over patches.

    Raises:
        LensError: as `rings`.

    Example:
        >>> lens.vision.receptive_field(lens.capture(vit, {"pixel_values": images}, keep_qk=True)).table()
    """
    check_counts(0, seed=seed)
    grid = grid_of(trace, image)
    far = np.hypot(*offsets(grid))
    whole = (0, trace.length)
    start, end = grid.span
    rollout = np.eye(trace.length)
    distance, alike, half, middle = [], [], [], []
    centre = grid.position(grid.height // 2, grid.width // 2) - start
    for layer in trace.layers:
        mean = np.mean([trace.tile(layer, head, whole, whole) for head in range(trace.heads)], 0)
        step = mean + np.eye(trace.length)
        rollout = (step / step.sum(-1, keepdims=True)) @ rollout
        part = rollout[start:end, start:end]
        part = part / part.sum(-1, keepdims=True)
        distance.append((part * far).sum(-1))
        own = 0.5 ** len(
            distance
        )  # of a patch that uniform attention and the stream leave where it is
        shared = (1 - own) / trace.length
        alike.append(shared * far.sum(-1) / (own + shared * len(part)))
        strongest = np.sort(part, -1)[:, ::-1].cumsum(-1)
        half.append(((strongest < 0.5).sum(-1) + 1).mean() / len(part))
        middle.append(grid.laid(part[centre]))
    by_patch, uniform = np.array(distance), np.array(alike)
    low, high = over_rows(by_patch, seed)
    more = over_rows(np.round(by_patch[-1:] - uniform[-1:], _DIGITS), seed)
    return ReceptiveField(
        by_patch.mean(-1),
        low,
        high,
        uniform.mean(-1),
        (float(more[0][0]), float(more[1][0])),
        np.array(half),
        np.array(middle),
        float(far.mean()),
        trace.layers,
    )
