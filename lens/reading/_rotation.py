"""Rotary embedding of one layer as the linear map that it is, read from what the model hands its attention.

Position i turns each plane of a query or key by an angle: `x -> R_i x`. Which coordinates share a plane
differs between models, so every known way is tried on the layer's own queries and keys, and the one that
gives what the attention got is taken; a layer that none explains is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.common.errors import LensError

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Rotation:
    """`R_i` of every position.

    Attributes:
        cos, sin: [tokens, planes], with the factor that some models put on both; None: nothing is turned.
        side_by_side: whether a plane is two neighbouring coordinates; else they are half the turned
            coordinates apart. Coordinates behind the turned ones pass through.
        factors: of queries and of keys, for models that put the scale on one of them (OPT).
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    side_by_side: bool = False
    factors: tuple[float, float] = (1.0, 1.0)

    @property
    def turns(self) -> bool:
        """Whether it changes anything."""
        return self.cos is not None

    def turned(
        self, x: Float[Tensor, "*parts positions width"], positions: Tensor | slice
    ) -> Float[Tensor, "*parts positions width"]:
        """`R_i x_i` of x whose second-last axis is these positions."""
        if self.cos is None or self.sin is None:
            return x
        cos, sin = self.cos[positions].to(x), self.sin[positions].to(x)
        first, second, rest = self.planes(x)
        one, two = first * cos - second * sin, second * cos + first * sin
        if self.side_by_side:
            return torch.cat([torch.stack([one, two], -1).flatten(-2), rest], -1)
        return torch.cat([one, two, rest], -1)

    def transposed(self, *, inverse: bool = False) -> Rotation:
        """`R^T` of every position, or its inverse, which differs where a factor is on both."""
        if self.cos is None or self.sin is None:
            return self
        size = (self.cos.double() ** 2 + self.sin.double() ** 2) if inverse else 1.0
        return replace(self, cos=self.cos / size, sin=-self.sin / size)

    def planes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both coordinates of each plane, [..., planes], and those that pass through."""
        count = 0 if self.cos is None else self.cos.shape[-1]
        turned, rest = x[..., : 2 * count], x[..., 2 * count :]
        if self.side_by_side:
            return turned[..., ::2], turned[..., 1::2], rest
        return turned[..., :count], turned[..., count:], rest


def find_rotation(
    given: tuple[Tensor, Tensor] | None,
    pairs: list[tuple[Tensor, Tensor]],
    tolerance: float,
    layer: int,
) -> Rotation:
    """The rotation that explains what a layer did.

    Args:
        given: cos and sin [1, tokens, width] that the layer was handed, or None.
        pairs: of queries, and of keys: [tokens, heads, width] before and after.
        tolerance: of the largest difference, over the largest number.
        layer: its number, for the error.

    Raises:
        LensError: none of the known ways does.
    """
    pairs = [(before.detach().double(), after.detach().double()) for before, after in pairs]
    tried = _candidates(given)
    error, found = _best(tried, pairs)
    if not error <= tolerance:
        error, found = _best([_scaled(one, pairs) for one in tried], pairs)
    if not error <= tolerance:
        raise LensError(
            f"queries and keys of layer {layer} are changed between their projection and their attention in a "
            f"way that is not known here (differs by {error:.1e} of the largest); logits of this layer cannot "
            "be taken apart"
        )
    return found


def _best(tried: list[Rotation], pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, Rotation]:
    errors = [_error(one, pairs) for one in tried]
    return min(errors), tried[errors.index(min(errors))]


def _candidates(given: tuple[Tensor, Tensor] | None) -> list[Rotation]:
    found = [Rotation()]
    if given is None:
        return found
    cos, sin = (part[0] for part in given)
    half = cos.shape[-1] // 2
    if _equal(cos[:, :half], cos[:, half:]) and _equal(sin[:, :half], sin[:, half:]):
        found.append(Rotation(cos[:, :half], sin[:, :half]))
    if _equal(cos[:, ::2], cos[:, 1::2]) and _equal(sin[:, ::2], sin[:, 1::2]):
        found.append(Rotation(cos[:, ::2], sin[:, ::2], True))
    return [*found, Rotation(cos, sin)]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _error(rotation: Rotation, pairs: list[tuple[Tensor, Tensor]]) -> float:
    if rotation.cos is not None and 2 * rotation.cos.shape[-1] > pairs[0][0].shape[-1]:
        return float("inf")
    worst = 0.0
    for (before, after), factor in zip(pairs, rotation.factors, strict=True):
        found = rotation.turned(before.transpose(0, 1), slice(None)).transpose(0, 1) * factor
        scale = max(float(after.abs().max()), torch.finfo(torch.float64).tiny)
        worst = max(worst, float((found - after).abs().max()) / scale)
    return worst


def _scaled(rotation: Rotation, pairs: list[tuple[Tensor, Tensor]]) -> Rotation:
    """The same with the factors that fit the lengths of queries and of keys."""
    sizes = [[float(part.norm()) for part in pair] for pair in pairs]
    one, other = (after / before if before else 1.0 for before, after in sizes)
    return replace(rotation, factors=(one, other))
