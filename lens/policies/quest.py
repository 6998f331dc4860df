"""Quest and LServe: pages of the key cache, scored by an upper bound of what a query can find there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.blocks import BlockView, in_blocks
from lens.policies.base import Kept, Policy, check_counts, largest, pairs


@dataclass(frozen=True)
class Quest(Policy):
    """For each query the pages with the largest bound on q·k: `u = sum over d of max(q_d high_d, q_d low_d)`.

    `high` and `low` are the largest and smallest entries of the keys of a page, after rotary embedding; no
    key of the page has a larger product. Pages are the key blocks: use `block_size=(1, page)`.

    Quest chooses in decoding only; here the same choice is made for each query of a prompt too, and query
    blocks of several rows keep the pages of any of them.

    Attributes:
        budget: tokens; at least 3 pages are kept.
        sub_pages: parts of a page with bounds of their own, of which the largest counts (LServe has 4 in
            pages of 64).
        reuse: queries of a prompt that share the choice of the first of them (LServe 4; Quest 1). A decoding step is one
            query and chooses anew: what an earlier step chose is not known to it.
        dense_layers: first layers that stay whole (Quest 2).

    Raises:
        LensError: numbers that are none; pages that cannot be cut into the sub-pages.

    Reference: Tang et al., Quest, arXiv 2406.10774; Yang et al., LServe, arXiv 2502.14866.

    Example:
        >>> lserve = lens.policies.Quest(4096, sub_pages=4, reuse=4, dense_layers=0)
    """

    budget: int = 1024
    sub_pages: int = 1
    reuse: int = 1
    dense_layers: int = 2
    block_size = (1, 16)

    def __post_init__(self) -> None:
        check_counts(self, "budget", "sub_pages", "reuse", least=1)
        check_counts(self, "dense_layers")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        if view.call.layer < self.dense_layers:
            return Kept(view.visible)
        bounds = self.bounds(view)
        seen = _row_sees(view)
        count = max(3, self.budget // view.key_block)
        chosen = largest(bounds, count, seen)
        if self.reuse > 1:  # the choice of the first of them, and each query's own page
            row = torch.arange(view.queries, device=bounds.device)
            own = (row + view.offset)[:, None] // view.key_block
            own = own == torch.arange(view.shape[3], device=bounds.device)
            chosen = (chosen[:, :, row // self.reuse * self.reuse] | own) & seen
        return Kept(in_blocks(chosen, view.query_block, -2).any(-2))

    def bounds(self, view: BlockView) -> Tensor:
        """[batch, heads, queries, pages]: no product of the query with a key of the page is larger."""
        if view.key_block % self.sub_pages:
            raise LensError(
                f"a page of {view.key_block} tokens cannot be cut into {self.sub_pages} sub-pages"
            )
        size = view.key_block // self.sub_pages
        high, low = (
            in_blocks(view.call.key.float(), view.key_block, -2, empty=empty)
            .flatten(2, 3)
            .unflatten(2, (-1, size))
            for empty in (-torch.inf, torch.inf)
        )
        high, low = high.amax(3), low.amin(3)
        empty = torch.isinf(high).any(-1)  # a sub-page after the last key
        high, low = (one.masked_fill(empty[..., None], 0) for one in (high, low))
        query = view.query.float()
        high, low = (one.repeat_interleave(view.share, 1).transpose(-1, -2) for one in (high, low))
        found = query.clamp(min=0) @ high + query.clamp(max=0) @ low
        empty = empty.repeat_interleave(view.share, 1)[:, :, None]
        found = found.masked_fill(empty, -torch.inf)
        return found.unflatten(-1, (-1, self.sub_pages)).amax(-1)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: two bounds a sub-page, as long as a key."""
        if view.call.layer < self.dense_layers:
            return 0.0
        seen = float(_row_sees(view)[0, 0].sum())
        return 2 * self.sub_pages * seen / min(self.reuse, view.queries) / pairs(view)


def _row_sees(view: BlockView) -> Tensor:
    """bool [batch, heads, queries, pages] that each single query sees."""
    return BlockView(view.call, 1, view.key_block, view.backend).visible
