"""Sparsifiner: a low-rank map over a learned basis of places predicts which blocks are worth looking at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.passes.blocks import BlockView
from lens.policies.base import pairs
from lens.policies.trained import Pooled, Trained, Weights

RANK = 8
"""Most places of the basis; a quarter of the blocks where these are few."""


@dataclass(frozen=True, eq=False)
class Sparsifiner(Trained):
    """In each row of blocks the best ones by a low-rank map.

        low = softmax(mean(q) (W_down mean(k))^T scale) [query_blocks, rank];  map = low W_up

    W_down and W_up [rank, key_blocks] are learned for each head by the squared difference from the exact
    masses. The basis is one of places: prompts may have at most as many blocks as those of the training
    had. It starts as the pooled map of runs of neighbouring blocks.

    The paper has single tokens of a picture and trains the model along; here the model stays.

    Attributes: see `lens.policies.trained.Trained`.

    Reference: Wei et al., Sparsifiner, arXiv 2303.13755.

    Example:
        >>> found = lens.policies.train("sparsifiner", model, texts, block_size=4, steps=20, progress=False)
        >>> str(found.keeping(top=2))
        'Sparsifiner(3 layers, top=2)'
    """

    kind = "sparsifiner"

    @classmethod
    def start(cls, seen: Pooled, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Trained`."""
        heads, blocks = seen.query.shape[1], seen.key.shape[2]
        rank = max(1, min(RANK, blocks // 4))
        run = torch.arange(blocks) * rank // blocks
        member = torch.nn.functional.one_hot(run, rank).T.float()
        mean = member / member.sum(-1, keepdim=True)
        return {"down": mean.repeat(heads, 1, 1), "up": mean.repeat(heads, 1, 1)}

    @classmethod
    def fits(cls, weights: Weights, seen: Pooled) -> bool:
        """See `Trained`."""
        return weights["down"].shape[0] == seen.query.shape[1]

    @classmethod
    def predicted(cls, weights: Weights, seen: Pooled) -> Tensor:
        """See `Trained`."""
        blocks = seen.key.shape[2]
        if blocks > weights["up"].shape[-1]:
            raise LensError(
                f"Sparsifiner was trained on {weights['up'].shape[-1]} blocks of keys and knows no others; "
                f"got {blocks}"
            )
        key = weights["down"][..., :blocks] @ seen.keys[:, :, :, 0]
        low = (seen.query @ key.transpose(-1, -2) * seen.scale).softmax(-1)
        return low @ weights["up"][..., :blocks]

    @classmethod
    def shares(cls, predicted: Tensor, seen: Pooled) -> Tensor:
        """See `Trained`: what is negative counts nothing."""
        found = predicted.clamp(min=0).masked_fill(~seen.visible, 0)
        return found / found.sum(-1, keepdim=True).clamp(min=1e-30)

    @classmethod
    def loss(cls, predicted: Tensor, seen: Pooled, masses: Tensor, peaks: Tensor) -> Tensor:
        """See `Trained`: mean over rows of the sum of squares."""
        off = (predicted - masses).masked_fill(~seen.visible, 0)
        return off.square().sum(-1).mean()

    def cost(self, view: BlockView) -> float:
        """See `Policy`."""
        _, _, rows, columns = view.shape
        rank = min(RANK, max(1, columns // 4))
        return rank * (2 * rows + columns) / pairs(view)
