"""How large alpha can be in a block of keys, where only the block map of a long prompt was kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import all_heads, head_columns
from lens.common.results import Result, Sentence
from lens.sinks.detection.alphas import Samples, check_epsilon, least_alpha, samples_of
from lens.traces.arrays import block_rows
from lens.traces.scores import FEWEST_VIEWERS, SINK_EPSILON

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace


@dataclass(frozen=True, repr=False, eq=False)
class BlockAlphas(Result):
    """Bounds of the largest alpha among the keys of each block; with `received`, alpha is exact.

    Attributes:
        lower, upper: [layers, heads, key_blocks]: the largest alpha of the block lies between them.
        judged: bool [layers, key_blocks], whether 16 queries see each of its keys (the first key is always judged).
        start, stop: [key_blocks], the block's first key and the one behind its last.
        layers: numbers of the layers.
        epsilon: threshold of a sink.
        samples: model, dtype, T and BOS policy; n is 1.
    """

    lower: np.ndarray = field(repr=False)
    upper: np.ndarray = field(repr=False)
    judged: np.ndarray = field(repr=False)
    start: np.ndarray = field(repr=False)
    stop: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    epsilon: float
    samples: Samples

    def table(self) -> pd.DataFrame:
        """One row per layer, head and block; `sink` is "yes", "no" or "undecided" by the bounds, or "not judged"."""
        _, heads, blocks = self.lower.shape
        places = all_heads(self.layers, heads)
        count = len(places)
        lower, upper = self.lower.ravel(), self.upper.ravel()
        sink = np.where(lower > self.epsilon, "yes", "undecided")
        sink = np.where(upper <= self.epsilon, "no", sink)
        judged = np.repeat(self.judged[:, None], heads, axis=1).ravel()
        return pd.DataFrame(
            head_columns([place for place in places for _ in range(blocks)])
            | {
                "start": np.tile(self.start, count),
                "stop": np.tile(self.stop, count),
                "alpha_lower_bound": lower,
                "alpha_upper_bound": upper,
                "sink": np.where(judged, sink, "not judged"),
                "epsilon": self.epsilon,
                "tokens": self.samples.tokens,
                "bos": self.samples.bos,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many blocks hold a sink for certain, how many none, how many may, and how many are not judged."""
        counts = self.table()["sink"].value_counts()
        yes, no, open_, other = (
            int(counts.get(name, 0)) for name in ("yes", "no", "undecided", "not judged")
        )
        counted = (
            f"Of {yes + no + open_} blocks of keys (all heads) {yes} hold a sink for certain and {no} "
            f"hold none (ε = {self.epsilon}, {self.samples})."
        )
        limit = (
            f"{open_} are undecided: the block map bounds alpha and does not give it. Capture "
            "`received` for exact numbers."
        )
        if other:
            limit += f" {other} more were not judged: fewer than {FEWEST_VIEWERS} queries see one of their keys."
        return (Sentence(counted, kind="blocks"), Sentence(limit, kind="limit"))


def block_bounds(trace: AttentionTrace, *, epsilon: float = SINK_EPSILON) -> BlockAlphas:
    """`R_J / sum_J v_k <= max_J alpha_k <= R_J / min_J v_k`, from block mass alone.

    R_J is what the block's keys receive together (block mass times the rows of each query block,
    summed over the query blocks) and v_k the number of queries that see key k: R_J is the sum of
    `alpha_k v_k`. Blocks with a key behind the first that fewer than 16 queries see are not judged: its attention to itself
    would look like a sink.

    Args:
        trace: with `block_mass`, of one prompt.
        epsilon: threshold of a sink.

    Raises:
        LensError: no block mass, or an epsilon outside 0 to 1, or that the first key exceeds by definition (1 / T).

    Example:
        >>> lens.sinks.block_bounds(trace).findings()
    """
    check_epsilon(epsilon, least_alpha(trace))
    if "block_mass" not in trace.dataset:
        raise LensError(
            "block_bounds needs block_mass; capture it: lens.capture(..., statistics=['block_mass'])"
        )
    mass = trace.dataset["block_mass"]
    starts = mass["key_block_start"].values
    stops = np.append(starts[1:], trace.length)
    rows = block_rows(mass, trace.queries)
    received = np.einsum("lhqk,q->lhk", mass.values.astype(float), rows.astype(float))
    visible = trace.visible.values.astype(float)  # [layers, keys]
    together = np.add.reduceat(visible, starts, axis=1)[:, None]
    fewest = np.minimum.reduceat(visible, starts, axis=1)[:, None]
    counted = np.where(np.arange(trace.length) == 0, FEWEST_VIEWERS, visible)
    judged = np.minimum.reduceat(counted, starts, axis=1) >= FEWEST_VIEWERS
    with np.errstate(divide="ignore", invalid="ignore"):
        lower = np.where(together > 0, received / together, np.nan)
        upper = np.where(fewest > 0, received / fewest, 1.0)
    return BlockAlphas(
        lower=lower,
        upper=np.minimum(upper, 1.0),
        judged=judged,
        start=starts,
        stop=stops,
        layers=trace.layers,
        epsilon=epsilon,
        samples=samples_of([trace]),
    )
