"""Native sparse attention's choice of blocks: by the attention over compressed keys, one for heads that share keys."""

from __future__ import annotations

from dataclasses import dataclass

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, check_counts, ends, largest, pooling_cost
from lens.policies.chunks import representatives


@dataclass(frozen=True)
class NativeSparse(Policy):
    """In each row of blocks the `top` key blocks with the most attention on their compressed keys.

        p[J] = softmax_J(q · c_J scale),   c_J the compressed keys of block J,   summed over the heads that share keys

    The first blocks and the last ones are always among them. The published model is trained so: it compresses by a small
    network, and adds gated branches for the compressed keys and for a window. This is the choice of its branch of
    selected blocks alone, with the mean of a block's keys for its compression, so that it runs on any model; a
    block that a row sees in part is not scored, and is one of the last.

    Attributes:
        top: number of blocks, the fixed ones included. Published: 16, of 64 keys, for each query.
        first, last: number of fixed ones; the last are that of the query and those before it. Published: 1, 2.

    Raises:
        LensError: numbers that are none, or more fixed blocks than `top`.

    Reference: Yuan et al. 2025, Native Sparse Attention, arXiv 2502.11089.

    Example:
        >>> str(lens.policies.NativeSparse(8))
        'NativeSparse(top=8)'
    """

    top: int = 16
    first: int = 1
    last: int = 2

    def __post_init__(self) -> None:
        check_counts(self, "first", "last", least=1)
        check_counts(self, "top", least=self.first + self.last)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        fixed = ends(view, before=self.last - 1, first=self.first)
        own = ends(view, first=0)
        logits = view.pooled[0] @ representatives(view.key, view.key_block, "mean").transpose(
            -1, -2
        )
        mass = (logits * view.call.scale).masked_fill(~view.visible | own, -1e30).softmax(-1)
        shared = mass.unflatten(1, (-1, view.share)).sum(2).repeat_interleave(view.share, 1)
        room = self.top - fixed.sum(-1, keepdim=True)
        return Kept(fixed | largest(shared, room, view.visible & ~fixed))

    def cost(self, view: BlockView) -> float:
        """See `Policy`."""
        return pooling_cost(view)
