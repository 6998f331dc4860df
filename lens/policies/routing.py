"""Routing Transformer: queries and keys that fall into the same cluster see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, by_distance, check_counts, pairs


@dataclass(frozen=True)
class Routing(Policy):
    """k-means on the normalised mean queries and mean keys of blocks; a block sees those of its cluster.

    The paper clusters single tokens with centroids that are trained; here blocks are clustered anew on
    each prompt, so that the choice stays one of blocks. Near blocks are kept, as half of its heads do.

    Attributes:
        clusters: number of them; about the square root of the number of blocks is the paper's balance.
        last: near tokens that are always seen.
        seed: of the first centroids.
        rounds: of k-means.

    Raises:
        LensError: numbers that are none.

    Reference: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers,
        arXiv 2003.05997.

    Example:
        >>> str(lens.policies.Routing(clusters=4))
        'Routing(clusters=4)'
    """

    clusters: int = 8
    last: int = 64
    seed: int = 0
    rounds: int = 10
    decodes = False

    def __post_init__(self) -> None:
        check_counts(self, "clusters", "last", "rounds", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        query, key = (torch.nn.functional.normalize(one, dim=-1) for one in view.pooled)
        centroids = self._centroids(torch.cat([query, key], 2))
        of_query, of_key = ((one @ centroids.transpose(-1, -2)).argmax(-1) for one in (query, key))
        same = of_query[..., None] == of_key[:, :, None]
        place = torch.arange(view.keys, device=query.device)
        return Kept(same | by_distance(view, place < self.last))

    def _centroids(self, points: Tensor) -> Tensor:
        """[batch, heads, clusters, dim] of unit length."""
        count = min(self.clusters, points.shape[2])
        order = torch.randperm(points.shape[2], generator=torch.Generator().manual_seed(self.seed))
        centroids = points[:, :, order[:count].to(points.device)]
        for _ in range(self.rounds):
            member = (points @ centroids.transpose(-1, -2)).argmax(-1)
            weight = torch.nn.functional.one_hot(member, count).float()
            sums = weight.transpose(-1, -2) @ points
            moved = torch.nn.functional.normalize(sums, dim=-1)
            centroids = torch.where(weight.sum(2)[..., None] > 0, moved, centroids)
        return centroids

    def cost(self, view: BlockView) -> float:
        """See `Policy`: each block against each centroid, each round."""
        _, _, rows, columns = view.shape
        return (rows + columns) * self.clusters * (self.rounds + 1) / pairs(view)
