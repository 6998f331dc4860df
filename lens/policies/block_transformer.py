"""Block Transformer: the lower layers look everywhere, the upper ones only inside their own block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, by_key, check_counts


@dataclass(frozen=True)
class GlobalToLocal(Policy):
    """Layers below `layers` keep everything; those from it on keep the keys of the query's own block.

    In the Block Transformer the lower half attends between embeddings of blocks and the upper half inside
    one block of 4 tokens, so that the upper half needs no cache of the context. Blocks lie side by side:
    the first token of a block sees itself alone, unlike in a sliding window. A model that was not trained
    so loses its sink with the first keys; `first` gives them back.

    Attributes:
        layers: how many of the first layers look everywhere.
        length: of a local block, tokens; published 4.
        first: keys that every layer keeps.

    Raises:
        LensError: numbers that are none.

    Reference: Ho et al., Block Transformer: Global-to-Local Language Modeling, arXiv 2406.02657.

    Example:
        >>> str(lens.policies.GlobalToLocal(layers=1, length=8))
        'GlobalToLocal(layers=1, length=8)'
    """

    layers: int
    length: int = 4
    first: int = 0
    block_size = (4, 4)

    def __post_init__(self) -> None:
        check_counts(self, "layers", "first")
        check_counts(self, "length", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        if view.call.layer < self.layers:
            return Kept(view.visible)
        _, _, rows, columns = view.shape
        device = view.query.device
        row = torch.arange(rows, device=device)[:, None] * view.query_block + view.offset
        column = torch.arange(columns, device=device) * view.key_block
        last_row = (row + view.query_block).clamp(max=view.keys) - 1
        last_column = (column + view.key_block).clamp(max=view.keys) - 1
        # Two runs of tokens share a local block where neither ends before the other one's first block.
        near = (column // self.length <= last_row // self.length) & (
            last_column // self.length >= row // self.length
        )
        place = torch.arange(view.keys, device=device)
        return Kept((near | by_key(view, place < self.first)).expand(view.shape))
