"""How far the heads of a vision tower look over the picture, in patches, beside uniform attention.

For a patch p of an h × w picture, over the patches q of the same picture (attention on [CLS] and registers is
kept apart),

    d(p) = sum_q P[p, q] |p - q| / sum_q P[p, q],        near(p) = sum_{|p - q|_max <= 1} P[p, q] / sum_q P[p, q],

with |p - q| Euclidean, in patches, and |p - q|_max the larger of the distances in rows and columns. Mean over all
p: the mean attention distance of Dosovitskiy et al. 2021 (arXiv 2010.11929; theirs is times the patch size in
pixels), and the mass on the first ring of Li et al. 2023 (arXiv 2303.13731), p itself with it. Uniform attention has
values that depend on the shape of the picture alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence
from lens.stats import over_rows
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


@dataclass(frozen=True, repr=False, eq=False)
class PatchDistances(Result):
    """How far each head looks; every array is [layers, heads].

    Attributes:
        distance: mean distance over the patches, in patches.
        low, high: its 95 % interval over rows.
        near: share of the attention on patches that lies on the patch itself and its 8 neighbours.
        elsewhere: mean attention of patches on what is no patch ([CLS], registers).
        uniform_distance, uniform_near: [layers] what uniform attention over the patches that each sees has.
        layers: numbers of the layers.
        grid: (height, width) of the picture in patches.
    """

    distance: np.ndarray = field(repr=False)
    low: np.ndarray = field(repr=False)
    high: np.ndarray = field(repr=False)
    near: np.ndarray = field(repr=False)
    elsewhere: np.ndarray = field(repr=False)
    uniform_distance: np.ndarray = field(repr=False)
    uniform_near: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    grid: tuple[int, int]

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `distance` with `_low` and `_high`, `near`, `elsewhere`."""
        return head_table(
            self.layers,
            {
                "distance": self.distance,
                "distance_low": self.low,
                "distance_high": self.high,
                "near": self.near,
                "elsewhere": self.elsewhere,
            },
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads look nearer and farther than uniform attention does."""
        fair = self.uniform_distance[:, None]
        nearer, farther = int((self.high < fair).sum()), int((self.low > fair).sum())
        height, width = self.grid
        return (
            Sentence(
                f"On {height} × {width} patches {nearer} of {self.distance.size} heads look nearer than uniform "
                f"attention ({in_words(fair, '.2f')} patches), their intervals below it, and {farther} "
                "farther.",
                kind="distance",
            ),
        )


def patch_distance(trace: AttentionTrace, *, seed: Seed = 0) -> PatchDistances:
    """How far over the picture each head looks, from the exact attention of every patch.

    Args:
        trace: of one picture through a vision tower, with q and k (`keep_qk`).
        seed: of the intervals over rows.

    Raises:
        LensError: as `lens.vision.rings`; a picture among the tokens of a language model, whose rows see less.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> lens.vision.patch_distance(trace).findings()
    """
    if given_as("AttentionTrace", trace=trace).attrs.get("patches") is None:
        raise LensError(
            "the patches of this trace are not known: it is of no picture that a vision tower saw alone"
        )
    grid = grid_of(trace)
    apart = offsets(grid)
    far, beside = np.hypot(*apart), np.abs(apart).max(0) <= 1
    rows = over_heads(
        trace, [_rows(one, far, beside) for _, one in maps(trace, grid)]
    )  # [layers, heads, 3, patches]
    low, high = over_rows(rows[:, :, 0], seed)
    even = of_uniform(trace, grid.span, lambda one: np.nanmean(_rows(one, far, beside)[:2], -1))
    distance, near, elsewhere = (np.nanmean(rows[:, :, part], -1) for part in range(3))
    return PatchDistances(
        *(distance, low, high, near, elsewhere),
        uniform_distance=even[:, 0],
        uniform_near=even[:, 1],
        layers=tuple(trace.layers),
        grid=(grid.height, grid.width),
    )


def _rows(mass: np.ndarray, far: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """[3, patches]: distance, share on neighbours, and mass that is on no patch; NaN without mass."""
    total = mass.sum(-1)
    scored = np.where(total > SMALLEST, total, np.nan)
    return np.stack([(mass * far).sum(-1) / scored, (mass * beside).sum(-1) / scored, 1 - total])
