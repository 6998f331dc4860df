"""Patterns on a picture: keys near in two dimensions, in the same row or column, or in chosen regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.passes.blocks import BlockView
from lens.policies.base import Kept, Policy, check_counts, largest

Pattern = Literal["neighbourhood", "dilated", "axial", "criss-cross", "window", "shifted"]


@dataclass(frozen=True)
class Grid(Policy):
    """A fixed pattern on the patches of a picture; tokens that are no patches see and are seen by all.

        neighbourhood   patches at most `radius` away in both directions; at the borders the square is
                        moved inwards, so every patch sees (2 radius + 1) ** 2 of them
        dilated         every `step`-th patch of the same square, `step` times as wide
        axial           the patches of the same row
        criss-cross     those of the same row or the same column
        window          those of the same window of `radius` x `radius`
        shifted         windows moved by half their size, as every second Swin layer has them

    Attributes:
        pattern: one of these.
        height, width: of the grid, patches.
        radius: of the square, or the side of a window.
        step: of "dilated".
        first: position of the first patch, behind [CLS] and registers.

    Raises:
        LensError: an unknown pattern, numbers that are none; a grid that is not in the prompt.

    Reference: Hassani et al., arXiv 2204.07143 and 2209.15001; Ho et al., arXiv 1912.12180; Huang et al.,
        arXiv 1811.11721; Liu et al. (Swin), arXiv 2103.14030.

    Example:
        >>> policy = lens.policies.Grid("criss-cross", 14, 14, first=1)
    """

    pattern: Pattern
    height: int
    width: int
    radius: int = 3
    step: int = 2
    first: int = 0
    block_size = (1, 1)

    def __post_init__(self) -> None:
        check_choice("pattern of Grid", self.pattern, Pattern)
        check_counts(self, "height", "width", "radius", "step", least=1)
        check_counts(self, "first")

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        near = self._near(view.query.device)
        return Kept(_among_all(view, near, self.first))

    def _near(self, device: torch.device) -> Tensor:
        """bool [patches, patches]."""
        place = torch.arange(self.height * self.width, device=device)
        y, x = place // self.width, place % self.width
        if self.pattern in ("axial", "criss-cross"):
            row = y[:, None] == y
            return row if self.pattern == "axial" else row | (x[:, None] == x)
        if self.pattern in ("window", "shifted"):
            by = self.radius // 2 if self.pattern == "shifted" else 0
            window = [(axis + by) // self.radius for axis in (y, x)]
            return (window[0][:, None] == window[0]) & (window[1][:, None] == window[1])
        step = self.step if self.pattern == "dilated" else 1
        return _square(y, self.height, self.radius, step) & _square(
            x, self.width, self.radius, step
        )


@dataclass(frozen=True)
class Regions(Policy):
    """BiFormer: the picture is cut into regions, and each region sees the `top` regions that fit it best.

    Regions are scored by `mean query · mean key`.

    Attributes:
        height, width: of the grid, patches.
        rows, columns: how many regions it is cut into.
        top: regions that each sees.
        first: position of the first patch.

    Raises:
        LensError: numbers that are none, regions that do not divide the grid; a grid that is not in the
            prompt.

    Reference: Zhu et al., BiFormer, arXiv 2303.08810.

    Example:
        >>> policy = lens.policies.Regions(14, 14, rows=7, columns=7, top=4)
    """

    height: int
    width: int
    rows: int = 7
    columns: int = 7
    top: int = 4
    first: int = 0
    block_size = (1, 1)

    def __post_init__(self) -> None:
        check_counts(self, "height", "width", "rows", "columns", "top", least=1)
        check_counts(self, "first")
        if self.height % self.rows or self.width % self.columns:
            raise LensError(
                f"{self.rows} x {self.columns} regions do not divide a grid of {self.height} x {self.width}"
            )

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        place = torch.arange(self.height * self.width, device=view.query.device)
        y, x = place // self.width, place % self.width
        region = y // (self.height // self.rows) * self.columns + x // (self.width // self.columns)
        own = torch.nn.functional.one_hot(region, self.rows * self.columns).T.float()
        own = own / own.sum(-1, keepdim=True)
        patches = _patches(view, len(place), self.first)
        scores = (own @ view.query[:, :, patches].float()) @ (
            own @ view.key[:, :, patches].float()
        ).transpose(-1, -2)
        chosen = largest(scores, self.top, torch.ones_like(scores, dtype=torch.bool))
        return Kept(_among_all(view, chosen[:, :, region][..., region], self.first))


def _square(at: Tensor, size: int, radius: int, step: int) -> Tensor:
    """bool [patches, patches] along one axis: 2 radius + 1 places, `step` apart, moved inwards at borders.

    With a step, the places are those of the query's own residue class.
    """
    inside = at // step
    last = (size - 1 - at % step) // step  # largest number of this residue class
    middle = torch.minimum(inside.clamp(min=radius), (last - radius).clamp(min=radius))
    same = at[:, None] % step == at % step
    return same & ((inside - middle[:, None]).abs() <= radius)


def _patches(view: BlockView, count: int, first: int) -> slice:
    if view.offset or first + count > view.keys:
        raise LensError(
            f"{count} patches from position {first} on are not in a prompt of {view.keys} tokens with "
            f"{view.offset} cached ones"
        )
    return slice(first, first + count)


def _among_all(view: BlockView, near: Tensor, first: int) -> Tensor:
    """bool blocks of pairs [..., patches, patches]; every other token sees and is seen by all."""
    patches = _patches(view, near.shape[-1], first)
    pairs = near.new_ones(*near.shape[:-2], view.queries, view.keys)
    pairs[..., patches, patches] = near
    return view.any_pair(pairs).expand(view.shape)
