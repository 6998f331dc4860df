"""SeerAttention: a gate of pooled queries and keys that learns which blocks hold the largest entries of P."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import pairs
from lens.policies.trained import DISTANCES, Pooled, Trained, Weights, by_place, divergence


@dataclass(frozen=True, eq=False)
class Seer(Trained):
    """In each row of blocks those that a trained gate expects to hold the largest entries of P.

        g[I, J] = (W_q mean(q_I)) . (W_k [mean, max, min](k_J)) scale + distance[I - J] + first[J = 0]

    for each head, trained by the KL divergence from the largest exact entries of each block (the
    `block_max` of our kernel, each row of blocks divided by its sum) to the softmax of g. The first quarter
    of the rows is left out of the loss, as published. It starts as the pooled map of `BlockSparse`.

    The published gate pools before rotary embedding and rotates the pools by the block's place; a call
    holds queries and keys after it, and a learned number for each distance (by powers of two) takes the
    place of that rotation.

    Attributes: see `lens.policies.trained.Trained`. Published: threshold 2e-3, or a share of the blocks.

    Reference: Gao et al., SeerAttention, arXiv 2410.13276; microsoft/SeerAttention.

    Example:
        >>> gate = lens.policies.train("seer", model, texts, block_size=4, steps=20, progress=False)
        >>> found = lens.policies.evaluate(model, texts, gate.keeping(top=2), block_size=4)
    """

    kind = "seer"

    @classmethod
    def start(cls, seen: Pooled, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Trained`: the pooled map."""
        _, heads, _, dim = seen.query.shape
        whole = torch.eye(dim).expand(heads, dim, dim)
        none = torch.zeros_like(whole)
        return {
            "query": whole.clone(),
            "key": torch.stack([whole, none, none], 1),
            "distance": torch.zeros(heads, DISTANCES),
            "first": torch.zeros(heads),
        }

    @classmethod
    def fits(cls, weights: Weights, seen: Pooled) -> bool:
        """See `Trained`."""
        return weights["query"].shape[:2] == (seen.query.shape[1], seen.query.shape[-1])

    @classmethod
    def predicted(cls, weights: Weights, seen: Pooled) -> Tensor:
        """See `Trained`: logits."""
        query = torch.einsum("bhid,hde->bhie", seen.query, weights["query"])
        key = torch.einsum("bhjfd,hfde->bhje", seen.keys, weights["key"])
        return query @ key.transpose(-1, -2) * seen.scale + by_place(weights, seen)

    @classmethod
    def loss(cls, predicted: Tensor, seen: Pooled, masses: Tensor, peaks: Tensor) -> Tensor:
        """See `Trained`."""
        after = predicted.shape[2] // 4
        late = Pooled(seen.query, seen.key, seen.visible[:, :, after:], seen.back, seen.scale)
        return divergence(predicted[:, :, after:], peaks[:, :, after:], late)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: one product for each pair of blocks, and the projections."""
        _, _, rows, columns = view.shape
        projected = (rows + 3 * columns) * view.query.shape[-1]
        return (float(view.visible[0, 0].sum()) + projected) / pairs(view)
