"""FlexPrefill: each head decides between vertical-slash and query-aware blocks, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView, in_blocks
from lens.policies.base import (
    Kept,
    Policy,
    by_band,
    check_counts,
    check_shares,
    covering,
    largest,
    pairs,
    pooling_cost,
)
from lens.policies.block_sparse import pooled_map
from lens.policies.vertical_slash import Probe


@dataclass(frozen=True)
class FlexPrefill(Policy):
    """A head whose pooled guess of the last rows is right gets query-aware blocks, any other lines.

    With a the mass of each key block in the last block of rows and b what the mean of these rows gives to
    the mean key of each block, the head is query-aware where `sqrt(JSD(a, b)) < tau` (natural logarithm,
    at most 0.833). Query-aware: of the whole pooled map the largest entries that make no more than `gamma` of it.
    Otherwise the fewest columns that hold `gamma` of the last rows, and the fewest diagonals, counted in
    blocks as if they lay side by side: the recall that comes out is not gamma.
    Where rows see later keys, a diagonal is that of both sides. The first column, the main diagonal and at least `least` tokens of both kinds are always kept.

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
        probe = Probe(view, view.query_block)
        aware = self.distance(view, probe.vertical) < self.tau
        masses = (probe.vertical, probe.slash)
        fewest = max(1, -(-self.least // view.key_block))
        counts = [self._count(mass, view.key_block).clamp(min=fewest) for mass in masses]
        found = pooled_map(view)
        rows = view.visible.any(-1).sum(-1)[..., None]
        chosen = covering(found.flatten(-2), self.gamma * rows, over=False).unflatten(
            -1, found.shape[-2:]
        )
        aimed = torch.full(view.shape[:2], float(self.gamma), device=aware.device)
        kept = torch.where(
            aware[..., None, None],
            chosen | _lines(view, *masses, fewest, fewest),
            _lines(view, *masses, *counts),
        )
        return Kept(kept, aimed)

    def distance(self, view: BlockView, vertical: Tensor) -> Tensor:
        """[batch, heads]: square root of the Jensen-Shannon divergence of truth and guess, nats."""
        true = in_blocks(vertical, view.key_block).sum(-1)
        true = true / true.sum(-1, keepdim=True).clamp(min=1e-30)
        rows = min(view.query_block, view.queries)
        query, key = view.query[:, :, -rows:].float().mean(2, keepdim=True), view.pooled[1]
        scores = (query @ key.transpose(-1, -2))[:, :, 0] * view.call.scale
        guess = scores.masked_fill(~view.visible[:, :, -1], -torch.inf).softmax(-1)
        middle = (true + guess) / 2
        both = torch.special.xlogy(true, true / middle) + torch.special.xlogy(guess, guess / middle)
        return (both.nan_to_num(nan=0).sum(-1) / 2).clamp(min=0).sqrt()

    def _count(self, mass: Tensor, size: int) -> Tensor:
        """How many blocks hold gamma of [..., keys], counted as if the best keys lay side by side."""
        needed = self.gamma * mass.sum(-1, keepdim=True)
        return covering(mass, needed).sum(-1, keepdim=True) // size + 1

    def cost(self, view: BlockView) -> float:
        """See `Policy`: the last block of rows, and a pooled map."""
        return min(view.query_block, view.queries) * view.keys / pairs(view) + pooling_cost(view)


def _lines(
    view: BlockView, vertical: Tensor, slash: Tensor, columns: Tensor | int, bands: Tensor | int
) -> Tensor:
    """The blocks of so many block columns and block diagonals, the first column and the main diagonal among them."""
    kept = []
    for mass, count in ((vertical, columns), (slash, bands)):
        sums = in_blocks(mass, view.key_block).sum(-1)
        sums[..., 0] = torch.inf
        kept.append(largest(sums, count, torch.ones_like(sums, dtype=torch.bool)))
    return kept[0][..., None, :] | by_band(view, kept[1])
