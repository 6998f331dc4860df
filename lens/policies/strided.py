"""S2-Attention: every head keeps its own stripes of blocks, and all heads together see everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, by_band, check_counts


@dataclass(frozen=True)
class Strided(Policy):
    """Near blocks, and every `stride`-th block of keys, shifted from head to head.

    Block J is kept for block I where `I - J < last`, or `(J + head * step + offset) mod stride == 0` with
    `step = max(1, stride // heads)`; I is the key block of any row of the query block. Where rows see later keys, near
    blocks are those on both sides.

    Attributes:
        last: near blocks, the query's own among them.
        stride: of the stripes, blocks.
        offset: of head 0.

    Raises:
        LensError: numbers that are none.

    Reference: Lin et al., S2-Attention, arXiv 2407.17678; linxihui/dkernel.

    Example:
        >>> str(lens.policies.Strided(stride=8))
        'Strided(stride=8)'
    """

    last: int = 16
    stride: int = 16
    offset: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "last", "stride", least=1)
        check_counts(self, "offset")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        _, heads, _, blocks = view.shape
        device = view.query.device
        step = max(1, self.stride // heads)
        at = torch.arange(blocks, device=device)
        shift = torch.arange(heads, device=device)[:, None] * step + self.offset
        stripes = ((at + shift) % self.stride == 0)[:, None]  # [heads, 1, blocks]
        return Kept((by_band(view, at < self.last) | stripes).expand(view.shape))
