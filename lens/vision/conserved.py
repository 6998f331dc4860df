"""Conserved flow: how unequally keys give, and how much of a row is its own.

Wu et al., "Flowformer", ICML 2022, arXiv 2202.06258. On softmax attention every row takes in 1; a key gives out
O_j, its received mass. Conserved, a row takes I_i = sum_j P_ij / O_j: small where it lives on keys that everyone looks at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, described
from lens.vision._patches import head_table, over_heads

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace


@dataclass(frozen=True, eq=False)
class Flow(Result):
    """Conserved flow of every head; every array is [layers, heads].

    Attributes:
        largest: highest received mass of a key, times the mean.
        gini: of the received mass over keys: 0 alike, near 1 all on one.
        entropy: of it, as a share of the highest possible.
        exclusive: lowest conserved intake of a row: how much its sources are its own.
        error: largest deviation of the conserved sums from the number of keys (0 in exact numbers).
        layers: numbers of the layers.
    """

    largest: np.ndarray = field(repr=False)
    gini: np.ndarray = field(repr=False)
    entropy: np.ndarray = field(repr=False)
    exclusive: np.ndarray = field(repr=False)
    error: float
    layers: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `largest`, `gini`, `entropy`, `exclusive`."""
        columns = ("largest", "gini", "entropy", "exclusive")
        return head_table(self.layers, {name: getattr(self, name) for name in columns})

    def findings(self) -> tuple[Sentence, ...]:
        """Which head gathers most on one key, and how unequal keys are over the layers."""
        place = np.unravel_index(int(self.largest.argmax()), self.largest.shape)
        name = HeadId(self.layers[int(place[0])], int(place[1]))
        first, last = self.gini[0].mean(), self.gini[-1].mean()
        return (
            Sentence(
                f"One key of {name} receives {self.largest[place]:.1f} times the mean; keys are unequal by a Gini of "
                f"{first:.2f} in layer {self.layers[0]} and {last:.2f} in layer {self.layers[-1]}.",
                kind="flow",
            ),
        )

    def __repr__(self) -> str:
        return described(self)


def flow(trace: AttentionTrace) -> Flow:
    """What keys give out and rows take in, conserved, over all positions of a trace.

    Args:
        trace: with q and k (`keep_qk`), of at most 4,096 positions.

    Raises:
        LensError: longer, or without exact tiles.

    Reference:
        arXiv 2202.06258, applied to softmax attention.

    Example:
        >>> lens.vision.flow(lens.capture(vit, {"pixel_values": images}, keep_qk=True)).table()
    """
    given_as("AttentionTrace", trace=trace)
    if trace.length > 4096:
        raise LensError(
            f"flow looks at whole maps of at most 4,096 positions, got {trace.length:,}"
        )
    whole = (0, trace.length)
    rows, worst = [], 0.0
    for head in trace.every_head:
        one = trace.tile(*head, whole, whole)
        out = one.sum(0)
        intake = (one / np.where(out > 0, out, 1)).sum(-1)
        worst = max(worst, abs(intake.sum() - (out > 0).sum()))
        ordered, n = np.sort(out), len(out)
        gini = ((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * ordered.sum())
        share = out / out.sum()
        entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(n)
        rows.append([out.max() / out.mean(), gini, entropy, intake.min()])
    found = np.moveaxis(over_heads(trace, rows), -1, 0)
    return Flow(*found, error=worst, layers=trace.layers)
