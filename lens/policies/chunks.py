"""Policies that give each block of keys one representative and score queries against it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lens.common.choices import check_choice
from lens.passes.blocks import BlockView, in_blocks, means
from lens.policies.base import Kept, Policy, check_counts, ends, largest, pairs, pooling_cost

Representative = Literal["first", "middle", "last", "mean"]


@dataclass(frozen=True)
class Landmark(Policy):
    """In each row of blocks the `top` key blocks whose representative key the mean query agrees with most.

    Landmark attention trains a token at the end of each block to stand for it ("last"); on a model that
    was not trained so it is an ordinary token. The first block and the block of the query are kept.

    Attributes:
        top: number of blocks beside those two.
        representative: "last" key of the block, or "first", "middle", or the "mean" of all.

    Raises:
        LensError: numbers that are none, an unknown representative.

    Reference: Mohtashami and Jaggi, Landmark Attention, arXiv 2305.16300.

    Example:
        >>> str(lens.policies.Landmark(8))
        'Landmark(top=8)'
    """

    top: int = 4
    representative: Representative = "last"

    def __post_init__(self) -> None:
        check_counts(self, "top", least=1)
        check_choice("representative", self.representative, Representative)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        query = view.pooled[0]
        key = representatives(view.key, view.key_block, self.representative)
        scores = query @ key.transpose(-1, -2)
        return Kept(largest(scores, self.top, view.visible & ~ends(view)) | ends(view))

    def cost(self, view: BlockView) -> float:
        """See `Policy`."""
        return pooling_cost(view)


@dataclass(frozen=True)
class LongHeads(Policy):
    """Each head picks chunks by a summary of them: attention of the chunk's mean answer over its keys.

    For each chunk `c = softmax(m K / sqrt(head_dim)) K` with m the mean over its rows of the head's own
    attention inside the chunk; queries score `q · c`. The first chunk, the chunk of the query and the one
    before it are always kept.

    The paper scores queries before rotary embedding; a call holds them after it, and with the distance in
    them. This follows the call, so far chunks rank differently than in the paper.

    Attributes:
        top: chunks in all; the paper takes 16 of 256 tokens.

    Raises:
        LensError: numbers that are none.

    Reference: Lu et al., LongHeads, arXiv 2402.10685; LuLuLuyi/LongHeads.

    Example:
        >>> str(lens.policies.LongHeads(8))
        'LongHeads(top=8)'
    """

    top: int = 16
    block_size = (64, 256)

    def __post_init__(self) -> None:
        check_counts(self, "top", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        forced = ends(view, before=1)
        scores = view.pooled[0] @ self.summaries(view).transpose(-1, -2)
        rest = (self.top - forced.sum(-1, keepdim=True)).clamp(min=0)
        return Kept(largest(scores, rest, view.visible & ~forced) | forced)

    def summaries(self, view: BlockView) -> Tensor:
        """[batch, heads, key_blocks, head_dim]."""
        size, scale = view.key_block, view.call.scale
        value = view.call.value.repeat_interleave(view.share, 1).float()
        found = []
        for start in range(0, view.keys, size):
            key = view.key[:, :, start : start + size].float()
            rows = slice(max(0, start - view.offset), max(0, start + size - view.offset))
            query = view.query[:, :, rows].float()
            if not query.shape[2]:  # a chunk of the cache: its queries are gone
                query = key
            inside = (query @ key.transpose(-1, -2) * scale).softmax(-1)
            if value.shape[-1] == key.shape[-1]:
                mean = (inside @ value[:, :, start : start + size]).mean(2, keepdim=True)
            else:
                mean = (inside @ key).mean(2, keepdim=True)
            weight = (mean @ key.transpose(-1, -2) * scale).softmax(-1)
            found.append(weight @ key)
        return torch.cat(found, 2)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: attention inside each chunk, then one product a chunk."""
        inside = view.keys * view.key_block
        return inside / pairs(view) + pooling_cost(view)


@dataclass(frozen=True)
class Hierarchical(Policy):
    """Top-k by halving: chunks are scored by one key each, the best are cut in two, down to a block.

    Attributes:
        top: key blocks that are kept in the end beside the first and last ones.
        levels: how often chunks are cut in two: the first ones hold 2 ** levels blocks.
        representative: which key stands for a chunk.
        first, last: blocks that are always kept.

    HiP 1.2 goes from chunks of 256 over 32 to 8 tokens with 32,768, 8,192 and 2,048 of them kept, the first
    256 and last 1,024 tokens always, five layers dense, and keeps the choice for 8 to 32 decoding steps;
    this is the general form, whose misses at each level `misses` counts.

    Raises:
        LensError: numbers that are none, an unknown representative.

    Reference: Lee et al., HiP Attention, arXiv 2406.09827.

    Example:
        >>> str(lens.policies.Hierarchical(8))
        'Hierarchical(top=8)'
    """

    top: int = 32
    levels: int = 3
    representative: Representative = "middle"
    first: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        check_counts(self, "top", "last", least=1)
        check_counts(self, "levels", "first")
        check_choice("representative", self.representative, Representative)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        forced = ends(view, before=self.last - 1, first=self.first)
        return Kept(self.by_level(view)[-1] | forced)

    def by_level(self, view: BlockView) -> list[Tensor]:
        """The blocks that are left after each level, bool [batch, heads, query_blocks, key_blocks] each."""
        query = view.pooled[0]
        left = view.visible
        found = []
        for level in range(self.levels, -1, -1):
            chunk = 2**level
            key = representatives(view.key, view.key_block * chunk, self.representative)
            scores = query @ key.transpose(-1, -2)
            among = in_blocks(left, chunk).any(-1)
            count = max(1, -(-self.top // chunk)) * (2 if level else 1)
            kept = largest(scores, count, among)
            left = left & kept.repeat_interleave(chunk, -1)[..., : left.shape[-1]]
            found.append(left)
        return found

    def misses(self, view: BlockView) -> list[float]:
        """Share of the mass of the best `top` blocks that is gone after each level."""
        best = largest(view.masses, self.top, view.visible)
        whole = (view.masses * best).sum()
        return [
            float(1 - (view.masses * best * left).sum() / whole) for left in self.by_level(view)
        ]

    def cost(self, view: BlockView) -> float:
        """See `Policy`: all chunks at the first level, twice the kept ones below."""
        blocks = float(view.visible[0, 0].sum())
        rows = float(view.visible[0, 0].any(-1).sum())
        return (blocks / 2**self.levels + 2 * self.top * rows) / pairs(view)


def representatives(key: Tensor, size: int, which: Representative) -> Tensor:
    """[batch, heads, blocks, dim]: one key for each `size` of [batch, heads, keys, dim]."""
    keys = key.shape[2]
    if which == "mean":
        return means(key, size)
    start = torch.arange(0, keys, size, device=key.device)
    inside = {"first": 0, "middle": size // 2, "last": size - 1}[which]
    return key[:, :, (start + inside).clamp(max=keys - 1)].float()
