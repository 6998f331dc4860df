"""Vertical-slash: whole key columns and whole diagonals, chosen from the last rows (MInference)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, by_distance, by_key, check_counts, largest, pairs


def line_masses(view: BlockView, probe: int) -> tuple[Tensor, Tensor]:
    """What each key column and each distance holds in the last `probe` rows.

    Returns:
        Sums of P over those rows, [batch, heads, keys] each; the second by query position less key.
    """
    rows = min(probe, view.queries)
    found = view.probabilities(view.queries - rows)
    query = torch.arange(view.keys - rows, view.keys, device=found.device)
    distance = (query[:, None] - torch.arange(view.keys, device=found.device)).clamp(min=0)
    slash = found.new_zeros(*found.shape[:2], view.keys)
    slash.scatter_add_(
        -1, distance.flatten().expand(*found.shape[:2], -1), found.flatten(-2)
    )  # what is after the query holds nothing
    return found.sum(-2), slash


@dataclass(frozen=True)
class VerticalSlash(Policy):
    """The `verticals` key columns and the `slashes` diagonals that hold most in the last `probe` rows.

    The first `first` columns and the last `last` diagonals are always among them. A block is kept where
    a kept line crosses it; published kernels gather columns one by one: `block_size=(64, 1)` counts so.

    Attributes:
        verticals, slashes: numbers of lines. MInference searches (30, 800), (100, 750), (500, 700) and
            (3500, 100).
        first, last: always kept; MInference forces 30 and 30 in its search and 30 and 100 when it runs.
        probe: rows at the end that are looked at.

    Its released search of version 2 leaves out the scale 1 / sqrt(head_dim), its inference does not; here
    both have it.

    Raises:
        LensError: numbers that are none.

    Reference: Jiang et al., MInference 1.0, arXiv 2407.02490; microsoft/MInference.

    Example:
        >>> str(lens.policies.VerticalSlash(30, 800))
        'VerticalSlash(verticals=30, slashes=800)'
    """

    verticals: int = 1000
    slashes: int = 6096
    first: int = 30
    last: int = 100
    probe: int = 64
    decodes = False

    def __post_init__(self) -> None:
        check_counts(self, "verticals", "slashes", "first", "last")
        check_counts(self, "probe", least=1)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        vertical, slash = line_masses(view, self.probe)
        total = vertical.sum(-1).clamp(min=1e-30)
        every = torch.ones_like(vertical, dtype=torch.bool)
        vertical[..., : self.first] = torch.inf
        slash[..., : self.last] = torch.inf
        columns = largest(vertical, max(self.verticals, self.first), every)
        diagonals = largest(slash, max(self.slashes, self.last), every)
        blocks = by_key(view, columns) | by_distance(view, diagonals)
        return Kept(blocks, self._expected(view, columns, diagonals, total))

    def _expected(
        self, view: BlockView, columns: Tensor, diagonals: Tensor, total: Tensor
    ) -> Tensor:
        """The share that the lines hold in the probed rows."""
        rows = min(self.probe, view.queries)
        found = view.probabilities(view.queries - rows)
        query = torch.arange(view.keys - rows, view.keys, device=found.device)
        distance = query[:, None] - torch.arange(view.keys, device=found.device)
        on = diagonals[..., distance.clamp(min=0)] & (distance >= 0)
        return torch.where(on | columns[:, :, None], found, 0).sum((-1, -2)) / total

    def cost(self, view: BlockView) -> float:
        """See `Policy`: one dense row for each probed query."""
        return min(self.probe, view.queries) * view.keys / pairs(view)
