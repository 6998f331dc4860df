"""FlexPrefill: each head decides between vertical-slash and query-aware blocks, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import (
    Kept,
    Policy,
    check_counts,
    check_shares,
    covering,
    largest,
    pairs,
)
from lens.policies.block_sparse import pooled_map, pooling_cost
from lens.policies.vertical_slash import line_masses


@dataclass(frozen=True)
class FlexPrefill(Policy):
    """A head whose pooled guess of the last rows is right gets query-aware blocks, any other lines.

    With a the mass of each key block in the last block of rows and b what the mean of these rows gives to
    the mean key of each block, the head is query-aware where `sqrt(JSD(a, b)) < tau` (natural logarithm,
    at most 0.833). Query-aware: of the whole pooled map the largest entries that make no more than `gamma` of it.
    Otherwise the fewest columns that hold `gamma` of the last rows, and the fewest diagonals, counted in
    blocks as if they lay side by side: the recall that comes out is not gamma.
    The first column, the main diagonal and at least `least` tokens of both kinds are always kept.

    Attributes:
        gamma: 0.9; 0.95 in its scripts for Llama 3.1 and GLM.
        tau: bound of the distance.
        least: tokens; 512 in its description, 1024 in its scripts.

    Its released code writes densities as shares of all blocks, causal or not, so dense reads about 0.5.

    Raises:
        LensError: numbers that are none.

    Reference: Lai et al., FlexPrefill, arXiv 2502.20766; bytedance/FlexPrefill.

    Example:
        >>> str(lens.policies.FlexPrefill(gamma=0.95))
        'FlexPrefill(gamma=0.95)'
    """

    gamma: float = 0.9
    tau: float = 0.1
    least: int = 512
    block_size = (128, 128)
    decodes = False

    def __post_init__(self) -> None:
        check_shares(self, "gamma")
        check_counts(self, "least")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        vertical, slash = line_masses(view, view.query_block)
        aware = self.distance(view, vertical) < self.tau
        fewest = max(1, -(-self.least // view.key_block))
        lines = self._lines(view, vertical, slash, fewest)
        found = pooled_map(view)
        rows = view.visible.any(-1).sum(-1)[..., None]
        chosen = covering(found.flatten(-2), self.gamma * rows, over=False).unflatten(
            -1, found.shape[-2:]
        )
        chosen = chosen | self._lines(view, vertical, slash, fewest, only=True)
        expected = torch.full(view.shape[:2], float(self.gamma), device=aware.device)
        return Kept(torch.where(aware[..., None, None], chosen, lines), expected)

    def distance(self, view: BlockView, vertical: Tensor) -> Tensor:
        """[batch, heads]: square root of the Jensen-Shannon divergence of truth and guess, nats."""
        true = _blocks(vertical, view.key_block)
        true = true / true.sum(-1, keepdim=True).clamp(min=1e-30)
        rows = min(view.query_block, view.queries)
        query, key = view.query[:, :, -rows:].float().mean(2, keepdim=True), view.pooled()[1]
        scores = (query @ key.transpose(-1, -2))[:, :, 0] * view.call.scale
        guess = scores.masked_fill(~view.visible[:, :, -1], -torch.inf).softmax(-1)
        middle = (true + guess) / 2
        both = torch.special.xlogy(true, true / middle) + torch.special.xlogy(guess, guess / middle)
        return (both.nan_to_num(nan=0).sum(-1) / 2).clamp(min=0).sqrt()

    def _lines(
        self, view: BlockView, vertical: Tensor, slash: Tensor, fewest: int, only: bool = False
    ) -> Tensor:
        """Blocks of the columns and diagonals; `only`: no more than the least number of them."""
        kept = []
        for mass in (vertical, slash):
            blocks = _blocks(mass, view.key_block)
            blocks[..., 0] = torch.inf  # the first column, the main diagonal
            needed = self.gamma * mass.sum(-1, keepdim=True)
            count = covering(mass, needed).sum(-1, keepdim=True) // view.key_block + 1
            count = count.clamp(min=fewest)
            every = torch.ones_like(blocks, dtype=torch.bool)
            kept.append(largest(blocks, fewest if only else count, every))
        columns, bands = kept
        _, _, rows, blocks = view.shape
        place = (torch.arange(rows, device=bands.device) * view.query_block + view.offset)[:, None]
        back = place // view.key_block - torch.arange(blocks, device=bands.device)
        return columns[..., None, :] | (bands[..., back.clamp(min=0)] & (back >= 0))

    def cost(self, view: BlockView) -> float:
        """See `Policy`: the last block of rows, and a pooled map."""
        return min(view.query_block, view.queries) * view.keys / pairs(view) + pooling_cost(view)


def _blocks(values: Tensor, size: int) -> Tensor:
    """Sums over each `size` of [..., keys]."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return padded.unflatten(-1, (-1, size)).sum(-1)
