"""DeepSeek Sparse Attention: a small indexer that all heads of a layer share ranks the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import pairs
from lens.policies.trained import DISTANCES, Pooled, Trained, Weights, by_place, divergence

HEADS, DIM = 4, 16
"""Of the indexer; published: 64 heads of 128."""


@dataclass(frozen=True, eq=False)
class Indexer(Trained):
    """One choice for all heads of a layer, by a light score with a ReLU.

        I[t, s] = sum over j of w_j(t) ReLU(q_j(t) . k(s)) + distance[t - s] + first[s = 0]

    with q_j, w_j and k linear maps of the queries and keys of all heads, trained by the KL divergence from
    the mean map of the heads to the softmax of I. With `block_size=1` it chooses single tokens, as
    published; with larger blocks it scores means. The published indexer reads the residual stream and
    rotates a part of q_j and k; a call holds queries and keys, and the learned numbers of places are those
    of `Seer`.

    `Oracle(top=..., shared=True)` is the most that such an indexer could reach.

    Attributes: see `lens.policies.trained.Trained`. Published: the 2,048 best tokens.

    Reference: DeepSeek-AI, DeepSeek-V3.2 (DeepSeek Sparse Attention), 2025.

    Example:
        >>> found = lens.policies.train("indexer", model, texts, block_size=4, steps=20, progress=False)
        >>> str(found.keeping(mass=0.9))
        'Indexer(3 layers, mass=0.9)'
    """

    kind = "indexer"

    @classmethod
    def start(cls, seen: Pooled, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Trained`."""
        _, heads, _, dim = seen.query.shape
        wide, narrow = heads * dim, seen.key.shape[1] * dim

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / shape[-2] ** 0.5

        return {
            "query": drawn(HEADS, wide, DIM),
            "key": drawn(narrow, DIM),
            "weight": drawn(wide, HEADS),
            "even": torch.ones(HEADS),
            "distance": torch.zeros(1, DISTANCES),
            "first": torch.zeros(1),
        }

    @classmethod
    def fits(cls, weights: Weights, seen: Pooled) -> bool:
        """See `Trained`."""
        wide = seen.query.shape[1] * seen.query.shape[-1]
        narrow = seen.key.shape[1] * seen.key.shape[-1]
        return (weights["query"].shape[1], weights["key"].shape[0]) == (wide, narrow)

    @classmethod
    def predicted(cls, weights: Weights, seen: Pooled) -> Tensor:
        """See `Trained`: logits [batch, 1, query_blocks, key_blocks]."""
        query, key = seen.query.transpose(1, 2).flatten(2), seen.key[:, :, :, 0]
        key = key.transpose(1, 2).flatten(2) @ weights["key"]
        found = torch.einsum("bid,hde->bhie", query, weights["query"])
        found = (found @ key[:, None].transpose(-1, -2) * DIM**-0.5).relu()
        heads = (query @ weights["weight"] + weights["even"]).transpose(1, 2)
        return (heads[..., None] * found).sum(1, keepdim=True) + by_place(weights, seen)

    @classmethod
    def loss(cls, predicted: Tensor, seen: Pooled, masses: Tensor, peaks: Tensor) -> Tensor:
        """See `Trained`."""
        one = Pooled(seen.query, seen.key, seen.visible[:, :1], seen.back, seen.scale)
        return divergence(predicted, masses.mean(1, keepdim=True), one)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: its products are shorter than those of the heads, and shared by them."""
        share = HEADS * DIM / (view.query.shape[-1] * view.shape[1])
        return share * float(view.visible[0, 0].sum()) / pairs(view)
