"""SpargeAttn: pooled blocks, and blocks that do not resemble themselves are always computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.blocks import BlockView, means
from lens.policies.base import Kept, Policy, check_shares, covering, largest, pooling_cost


@dataclass(frozen=True)
class Sparge(Policy):
    """The largest blocks whose pooled softmax makes no more than `mass`, among keys whose block is uniform.

    A block is uniform where the mean cosine of all pairs of its rows is above `similarity`. Rows of
    query blocks that are not, and columns of key blocks that are not, are computed whole.

    Attributes:
        similarity: 0.6, or -0.1 with `share`.
        mass: 0.98. As in the released code the block that passes it is left out, unless it is the only
            one: up to one block less than the mass is kept.
        share: instead of `mass`, the share of all key blocks, seen or not, that a row keeps; 0.5 in its
            top-k variant.

    Its second stage, which skips values where a row's largest logit lies 50 below, changes no block.

    Raises:
        LensError: numbers that are none.

    Reference: Zhang et al., SpargeAttn, arXiv 2502.18137; thu-ml/SpargeAttn.

    Example:
        >>> str(lens.policies.Sparge(mass=0.9))
        'Sparge(mass=0.9)'
    """

    similarity: float = 0.6
    mass: float = 0.98
    share: float | None = None
    block_size = (128, 64)
    decodes = False

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 1:
            raise LensError(
                f"similarity of Sparge must be a cosine, -1 to 1, got {self.similarity!r}"
            )
        check_shares(self, "mass", *(["share"] if self.share is not None else []))

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        query, key = view.pooled
        even_query = _resemblance(view.query, view.query_block) > self.similarity
        even_key = _resemblance(view.key, view.key_block) > self.similarity
        among = view.visible & even_key[:, :, None]
        scores = query @ key.transpose(-1, -2) * view.call.scale
        found = scores.masked_fill(~among, -torch.inf).softmax(-1).nan_to_num(nan=0)
        if self.share is not None:
            kept = largest(found, max(1, int(self.share * view.shape[3])), among)
        else:
            kept = covering(found, self.mass, over=False) | largest(found, 1, among)
        return Kept((kept | ~even_key[:, :, None] | ~even_query[..., None]) & view.visible)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: a pooled map; the cosines are linear in the tokens."""
        return pooling_cost(view)


def _resemblance(values: Tensor, size: int) -> Tensor:
    """[batch, heads, blocks]: mean cosine of all pairs of rows of a block, each with itself too."""
    return means(torch.nn.functional.normalize(values.float(), dim=-1), size).square().sum(-1)
