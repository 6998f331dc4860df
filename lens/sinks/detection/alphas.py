"""`alpha`, the mean attention that a key receives from the queries that see it, out of traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lens.common.errors import LensError
from lens.traces.scores import FEWEST_VIEWERS, SINK_EPSILON

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace


@dataclass(frozen=True)
class Samples:
    """What must be told with every number about sinks.

    Attributes:
        model, dtype: of the traces.
        tokens: T, the same in all of them.
        bos: "added" or "absent", the same in all of them.
        n: number of traces.
    """

    model: str
    dtype: str
    tokens: int
    bos: str
    n: int

    def __str__(self) -> str:
        return f"{self.model}, T = {self.tokens}, BOS {self.bos}, n = {self.n}, {self.dtype}"


def as_list(traces: AttentionTrace | Sequence[AttentionTrace]) -> list[AttentionTrace]:
    """The traces, of which there is at least one.

    Raises:
        LensError: an empty list.
    """
    found = list(traces) if isinstance(traces, Sequence) else [traces]
    if not found:
        raise LensError("sinks need at least one trace, got an empty list")
    return found


def samples_of(traces: Sequence[AttentionTrace]) -> Samples:
    """What the traces have in common.

    Raises:
        LensError: they differ in model, type, length or BOS, so that their rates do not compare.
    """
    for name, values in (
        ("model", [trace.model for trace in traces]),
        ("dtype", [trace.attrs["dtype"] for trace in traces]),
        ("number of tokens", [trace.length for trace in traces]),
        ("BOS", [trace.attrs["bos"] for trace in traces]),
        ("layers × heads", [(trace.layers, trace.heads) for trace in traces]),
    ):
        if len(set(values)) > 1:
            raise LensError(
                f"sink rates compare only at one {name}; the traces have "
                f"{sorted(set(values))}: cut the prompts alike, or measure each kind apart"
            )
    first = traces[0]
    return Samples(first.model, first.attrs["dtype"], first.length, first.attrs["bos"], len(traces))


def alpha_of(trace: AttentionTrace) -> np.ndarray:
    """`alpha_k = received_k / (number of queries that see k)`, [layers, heads, keys].

    NaN for keys behind the first one that fewer than `FEWEST_VIEWERS` queries see, and for keys that
    none sees. On the uniform causal head `alpha_k = (H_T - H_(k-1)) / (T - k + 1)` counting from 1.

    Raises:
        LensError: the trace has no `received`.
    """
    if "received" not in trace.dataset:
        raise LensError(
            "sinks need received; capture it: lens.capture(..., statistics=['received'])"
        )
    visible = trace.visible.values[:, None].astype(float)  # [layers, 1, keys]
    enough = visible >= np.where(np.arange(trace.length) == 0, 1, FEWEST_VIEWERS)
    received = trace.received.values.astype(float)
    return np.where(enough, received / np.where(enough, visible, 1), np.nan)


def alpha_at(traces: Sequence[AttentionTrace], key: int) -> np.ndarray:
    """`alpha` of one key, [traces, layers, heads].

    Raises:
        LensError: a key that is not there or too close to the edge.
    """
    found = []
    for trace in traces:
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < trace.length:
            raise LensError(f"key must be a position 0 to {trace.length - 1}, got {key!r}")
        alpha = alpha_of(trace)[..., key]
        if np.isnan(alpha).any():
            seen = int(trace.visible.values[:, key].min())
            raise LensError(
                f"key {key} is seen by {seen} queries in some layer and needs {FEWEST_VIEWERS}: near "
                "the end a key's attention to itself looks like a sink; take an earlier key"
            )
        found.append(alpha)
    return np.stack(found)


def check_epsilon(epsilon: float) -> None:
    """Raises LensError unless 0 < epsilon < 1."""
    if not 0 < epsilon < 1:
        raise LensError(
            f"epsilon must lie between 0 and 1, got {epsilon}; Gu et al. use {SINK_EPSILON}"
        )
