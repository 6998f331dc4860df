"""Vertical-slash: whole key columns and whole diagonals, chosen from the last rows (MInference)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, by_distance, by_key, check_counts, largest, pairs


class Probe:
    """The last rows of a call, and what lines hold in them.

    Attributes:
        rows: P [batch, heads, rows, keys] of the last rows.
        distance: [rows, keys], query position less key, without its sign: rows that see later keys have both sides.
        vertical: sums of P over the rows of each key column, [batch, heads, keys].
        slash: of each distance, the same shape.
    """

    def __init__(self, view: BlockView, rows: int) -> None:
        count = min(rows, view.queries)
        self.rows = found = view.probabilities(view.queries - count)
        place = torch.arange(view.keys, device=found.device)
        self.distance = (place[view.keys - count :, None] - place).abs()
        self.vertical = found.sum(-2)
        flat = self.distance.flatten().expand(*found.shape[:2], -1)
        self.slash = torch.zeros_like(self.vertical).scatter_add_(-1, flat, found.flatten(-2))


@dataclass(frozen=True)
class VerticalSlash(Policy):
    """The `verticals` key columns and the `slashes` diagonals that hold most in the last `probe` rows.

    Where rows see later keys, a diagonal is that of both sides. The first `first` columns and the last `last` diagonals are always among them. A block is kept where
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
        probe = Probe(view, self.probe)
        vertical, slash = probe.vertical.clone(), probe.slash.clone()
        every = torch.ones_like(vertical, dtype=torch.bool)
        vertical[..., : self.first] = torch.inf
        slash[..., : self.last] = torch.inf
        columns = largest(vertical, max(self.verticals, self.first), every)
        diagonals = largest(slash, max(self.slashes, self.last), every)
        on = diagonals[..., probe.distance]
        held = torch.where(on | columns[:, :, None], probe.rows, 0).sum((-1, -2))
        expected = held / probe.vertical.sum(-1).clamp(min=1e-30)
        return Kept(by_key(view, columns) | by_distance(view, diagonals), expected)

    def cost(self, view: BlockView) -> float:
        """See `Policy`: one dense row for each probed query."""
        return min(self.probe, view.queries) * view.keys / pairs(view)
