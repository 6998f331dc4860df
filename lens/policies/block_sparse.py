"""Block-sparse: the blocks whose mean query and mean key agree most (MInference, BiFormer's regions)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, check_counts, check_shares, largest, pooling_cost
from lens.policies.budgets import expected


def pooled_map(view: BlockView) -> Tensor:
    """Softmax over the visible key blocks of `mean q · mean k`: [batch, heads, query_blocks, key_blocks]."""
    query, key = view.pooled
    scores = query @ key.transpose(-1, -2) * view.call.scale
    return scores.masked_fill(~view.visible, -torch.inf).softmax(-1).nan_to_num(nan=0)


@dataclass(frozen=True)
class BlockSparse(Policy):
    """In each row of blocks the `top` key blocks by the product of the mean query and the mean key.

    BiFormer chooses its regions so, with regions of a picture as blocks (`lens.policies.grids.Regions`).

    Attributes:
        top: number of blocks; MInference runs with 100 blocks of 64.
        share: instead of `top`, a share of the blocks that the row sees; its search takes 1 / 8 of blocks
            of 32.

    Raises:
        LensError: numbers that are none, or both.

    Reference: Jiang et al., MInference 1.0, arXiv 2407.02490; Zhu et al., BiFormer, arXiv 2303.08810.

    Example:
        >>> str(lens.policies.BlockSparse(share=0.125))
        'BlockSparse(share=0.125)'
    """

    top: int | None = None
    share: float | None = None
    decodes = False

    def __post_init__(self) -> None:
        if self.top is not None and self.share is not None:
            raise LensError("BlockSparse takes top or share, not both")
        if self.share is not None:
            check_shares(self, "share")
        elif self.top is not None:
            check_counts(self, "top", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        found = pooled_map(view)
        count: Tensor | int = self.top or 100
        if self.share is not None:
            count = (view.visible.sum(-1, keepdim=True) * self.share).ceil()
        blocks = largest(found, count, view.visible)
        return Kept(blocks, expected(found, blocks, view))

    def cost(self, view: BlockView) -> float:
        """See `Policy`."""
        return pooling_cost(view)
