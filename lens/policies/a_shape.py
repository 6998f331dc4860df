"""A-shape: the first keys and the last ones, the policy of StreamingLLM and of streaming heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, by_distance, by_key, check_counts


@dataclass(frozen=True)
class AShape(Policy):
    """Keys j with `j < first`, and those with `i - j < last`, the query's own among them.

    Where rows see later keys, near ones are those on both sides: `|i - j| < last`.

    A block is kept where one pair of it is, so with blocks of 1 token the policy is exact, and with
    larger ones it keeps a little more, as a block-sparse kernel does.

    Attributes:
        first, last: numbers of keys. MInference searches with 100 and 800; DuoAttention trains with 128
            and 256 and runs with 64 and 256.

    Raises:
        LensError: numbers that are none.

    Reference: Xiao et al., arXiv 2309.17453; Jiang et al. (MInference), arXiv 2407.02490.

    Example:
        >>> found = lens.policies.evaluate(model, texts, lens.policies.AShape(16, 16), block_size=16)
    """

    first: int = 64
    last: int = 256

    def __post_init__(self) -> None:
        check_counts(self, "first")
        check_counts(self, "last", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        place = torch.arange(view.keys, device=view.query.device)
        near = by_distance(view, place < self.last)
        return Kept((by_key(view, place < self.first) | near).expand(view.shape))
