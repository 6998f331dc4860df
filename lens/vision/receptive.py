"""From how far information can have reached a patch, layer by layer.

The receptive field follows attention through the layers: R_0 = I, R_l = normalised (A_l + I) R_(l-1) with A_l the mean
of the heads (rollout, Abnar & Zuidema 2020, arXiv 2005.00928). It is what could have been looked at, not what was used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import Seed
from lens.common.results import Result, Sentence
from lens.stats import over_rows
from lens.vision._patches import grid_of, offsets, uniform_maps

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

_DIGITS = 4  # of distances in patches: single precision is no finding


@dataclass(frozen=True, repr=False, eq=False)
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
                f"({self.alike[-1]:.2f}; the difference is {low:+z.2f} to {high:+z.2f}).",
                kind="beyond",
            ),
        )


def receptive_field(trace: AttentionTrace, *, image: int = 0, seed: Seed = 0) -> ReceptiveField:
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
    grid = grid_of(trace, image)
    far = np.hypot(*offsets(grid))
    whole = (0, trace.length)
    start, end = grid.span
    rollout = np.eye(trace.length)
    fair = np.eye(trace.length)
    distance, alike, half, middle = [], [], [], []
    centre = grid.position(grid.height // 2, grid.width // 2) - start
    for layer, even, _ in uniform_maps(trace, whole):
        mean = np.mean([trace.tile(layer, head, whole, whole) for head in range(trace.heads)], 0)
        rollout = _rolled(mean, rollout)
        part = rollout[start:end, start:end]
        part = part / part.sum(-1, keepdims=True)
        distance.append((part * far).sum(-1))
        fair = _rolled(even, fair)
        there = fair[start:end, start:end]
        alike.append((there * far).sum(-1) / there.sum(-1))
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


def _rolled(attention: np.ndarray, before: np.ndarray) -> np.ndarray:
    """What reaches every position through one more layer, whose stream hands on what was there."""
    step = attention + np.eye(len(attention))
    return (step / step.sum(-1, keepdims=True)) @ before
