"""XAttention: sums along the antidiagonals of each block tell how much the block holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.common.errors import LensError
from lens.passes.blocks import BlockView, in_blocks
from lens.policies.base import Kept, Policy, check_counts, check_shares, covering, ends


@dataclass(frozen=True)
class XAttention(Policy):
    """Each row of blocks keeps the fewest blocks that make `threshold` of its antidiagonal scores.

    With stride S and tiles of S x S pairs

        score(r, c) = sum over t < S of q[r S + S - 1 - t] · k[c S + t] / (sqrt(head_dim) S)

    softmax over the tiles that are seen, summed over blocks. The first block and the block of the query
    itself are always kept.

    Attributes:
        threshold: 0.9 where it estimates by default, 0.8 where it runs.
        stride: 8 or 16; both block sizes must be multiples of it.

    Its option `keep_sink` sets the first row of queries and not the first column of keys; the first
    column is kept anyway.

    Raises:
        LensError: numbers that are none; a stride that does not fit the blocks.

    Reference: Xu et al., XAttention, arXiv 2503.16428; mit-han-lab/x-attention.

    Example:
        >>> str(lens.policies.XAttention(0.8))
        'XAttention(threshold=0.8)'
    """

    threshold: float = 0.9
    stride: int = 8
    block_size = (128, 128)
    decodes = False

    def __post_init__(self) -> None:
        check_shares(self, "threshold")
        check_counts(self, "stride", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        stride = self.stride
        if view.query_block % stride or view.key_block % stride:
            raise LensError(
                f"XAttention with stride {stride} needs blocks that are multiples of it, got "
                f"{view.query_block} and {view.key_block}"
            )
        query = _strided(view.query.float().flip(2), stride, -view.queries % stride).flip(2)
        key = _strided(view.key.float(), stride, 0)
        scores = query @ key.transpose(-1, -2) * (view.call.scale / stride)
        row = (torch.arange(query.shape[2], device=key.device) + 1) * stride - 1 + view.offset
        column = torch.arange(key.shape[2], device=key.device) * stride
        seen = column <= row[:, None] if view.call.mask.causal else column[None] >= 0
        found = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        tiles = (view.query_block // stride, view.key_block // stride)
        sums = _block_sums(found, *tiles) * view.visible
        forced = ends(view)
        rest = self.threshold * sums.sum(-1, keepdim=True) - (sums * forced).sum(-1, keepdim=True)
        kept = forced | covering(sums * ~forced, rest)
        share = (sums * kept).sum(-1) / sums.sum(-1).clamp(min=1e-30)
        return Kept(kept, share.mean(-1))

    def cost(self, view: BlockView) -> float:
        """See `Policy`: one product for each stride x stride tile, of vectors stride times as long."""
        return 1 / self.stride


def _strided(values: torch.Tensor, stride: int, before: int) -> torch.Tensor:
    """`stride` rows side by side: [batch, heads, rows / stride, stride * dim]; zeros fill the rest."""
    after = (-(values.shape[2] + before)) % stride
    padded = torch.nn.functional.pad(values, (0, 0, before, after))
    return padded.unflatten(2, (-1, stride)).flatten(3)


def _block_sums(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return in_blocks(in_blocks(values, columns).sum(-1), rows, -2).sum(-2)
