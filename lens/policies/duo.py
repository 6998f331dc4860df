"""DuoAttention: heads whose trained gate is closed stream, the others stay full."""

from __future__ import annotations

import numpy as np

from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.heads.pruning.gates import StreamingGate
from lens.policies.a_shape import AShape
from lens.policies.base import Full
from lens.policies.per_head import PerHead


def from_gates(
    gate: StreamingGate, *, full: float = 0.5, first: int | None = None, last: int | None = None
) -> PerHead:
    """The key-value heads with the most open gates stay full, the others see the first and last keys.

    Args:
        gate: as `lens.heads.pruning.gate` trains it.
        full: share of the key-value heads that stay full, rounded; published 0.25 for models with a key head
            for each query head and 0.5 for those that share them.
        first, last: of the streaming heads; None: as trained. Published: trained with 128 and 256, run with
            64 and 256.

    Raises:
        LensError: a share outside 0 to 1, numbers of keys that are none.

    Reference: Xiao et al., DuoAttention, arXiv 2410.10819; mit-han-lab/duo-attention.

    Example:
        >>> gate = lens.heads.pruning.gate(model, texts, first=1, last=8, steps=4, progress=False)
        >>> policy = lens.policies.from_gates(gate, full=0.5)
    """
    streaming = AShape(gate.first if first is None else first, gate.last if last is None else last)
    return by_gates(most_open(gate.alpha, full), gate.heads, streaming)


def most_open(alpha: np.ndarray, full: float) -> np.ndarray:
    """[layers, key-value heads], whether the gate is among the share `full` of the most open ones; the first of equal ones.

    Raises:
        LensError: a share outside 0 to 1.
    """
    if not is_number(full) or not 0 <= full <= 1:
        raise LensError(f"full must be a share from 0 to 1, got {full!r}")
    is_full = np.zeros(alpha.size, bool)
    is_full[np.argsort(-alpha, axis=None, kind="stable")[: round(full * alpha.size)]] = True
    return is_full.reshape(alpha.shape)


def by_gates(is_full: np.ndarray, heads: int, streaming: AShape) -> PerHead:
    """`Full` for the `heads` query heads of a layer whose key-value head is full, `streaming` for the others."""
    by_head = is_full.repeat(heads // is_full.shape[1], 1)
    return PerHead(
        {HeadId(*at): Full() if by_head[at] else streaming for at in np.ndindex(by_head.shape)}
    )
