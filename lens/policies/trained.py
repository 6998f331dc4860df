"""What predictors of the map have in common: weights of each layer, pooled queries and keys, a budget."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens.common.errors import LensError
from lens.common.files import as_path, write_atomically
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, in_blocks, means
from lens.policies.base import Kept, Policy
from lens.policies.budgets import check_budget, within

Weights = Mapping[str, Tensor]
_Self = TypeVar("_Self", bound="Trained")


@dataclass(frozen=True, eq=False)
class Pooled:
    """What a predictor sees of a call.

    Attributes:
        query: [batch, heads, query_blocks, dim], mean of each block.
        key: [batch, kv_heads, key_blocks, 3, dim], mean, largest and smallest entries of each block.
        visible: bool [batch, heads, query_blocks, key_blocks].
        back: [query_blocks, key_blocks], blocks from a query block back to a key block.
        scale: of the logits.
    """

    query: Tensor
    key: Tensor
    visible: Tensor
    back: Tensor
    scale: float

    @cached_property
    def keys(self) -> Tensor:
        """`key` beside each query head."""
        return self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)


def pooled(view: BlockView) -> Pooled:
    """Of the view's blocks."""
    key = view.call.key.float()
    high = in_blocks(key, view.key_block, -2, empty=-torch.inf).amax(-2)
    low = in_blocks(key, view.key_block, -2, empty=torch.inf).amin(-2)
    _, _, rows, columns = view.shape
    row = torch.arange(rows, device=key.device) * view.query_block + view.offset
    back = row[:, None] // view.key_block - torch.arange(columns, device=key.device)
    return Pooled(
        means(view.query, view.query_block),
        torch.stack([means(key, view.key_block), high, low], 3),
        view.visible,
        back,
        view.call.scale,
    )


@dataclass(frozen=True, eq=False)
class Trained(Policy):
    """A predictor of the map, trained by `lens.policies.train`, and how many blocks it takes.

    Attributes:
        weights: of each layer that was trained, by the model's own number; other layers stay dense.
        block_size: (query_block, key_block) that it was trained with; it runs with no other.
        top, share, mass, threshold, like: as of `Oracle`, with the predicted map in place of the exact
            one; threshold: blocks whose predicted share is above it.
        losses: [steps] of each layer, of the training.
    """

    weights: Mapping[int, Weights]
    block_size: tuple[int, int] = (64, 64)
    top: int | None = None
    share: float | None = None
    mass: float | None = None
    threshold: float | None = None
    like: Policy | None = None
    losses: Mapping[int, np.ndarray] = field(default_factory=dict)
    decodes = False
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_budget(self, *_BUDGETS)

    @classmethod
    @abstractmethod
    def start(cls, seen: Pooled, generator: torch.Generator) -> dict[str, Tensor]:
        """Weights before training, for calls of this shape."""

    @classmethod
    @abstractmethod
    def fits(cls, weights: Weights, seen: Pooled) -> bool:
        """Whether the weights are those of a layer with such heads."""

    @classmethod
    @abstractmethod
    def predicted(cls, weights: Weights, seen: Pooled) -> Tensor:
        """[batch, heads | 1, query_blocks, key_blocks], larger for better blocks."""

    @classmethod
    @abstractmethod
    def loss(cls, predicted: Tensor, seen: Pooled, masses: Tensor, peaks: Tensor) -> Tensor:
        """Of a prediction.

        Args:
            masses: exact mean mass of each block over its rows.
            peaks: largest entry of P of each block.
        """

    @classmethod
    def shares(cls, predicted: Tensor, seen: Pooled) -> Tensor:
        """[batch, heads, query_blocks, key_blocks] that sum to 1 in a row: here the softmax of logits."""
        logits = predicted.masked_fill(~seen.visible, -torch.inf)
        return logits.softmax(-1).nan_to_num(nan=0)

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        if (view.query_block, view.key_block) != tuple(self.block_size):
            raise LensError(
                f"{type(self).__name__} was trained with blocks of {self.block_size}, not of "
                f"({view.query_block}, {view.key_block}): train it anew"
            )
        weights = self.weights.get(view.call.layer)
        if weights is None:
            return Kept(view.visible)
        seen = pooled(view)
        if not self.fits(weights, seen):
            raise LensError(
                f"{type(self).__name__} was trained on a model with other heads than these "
                f"{seen.query.shape[1]} of {seen.query.shape[-1]}: train it on this one"
            )
        here = {name: one.to(view.query.device) for name, one in weights.items()}
        return Kept(within(self, self.shares(self.predicted(here, seen), seen), view))

    def check(self, model: LoadedModel) -> None:
        """See `Policy`."""
        super().check(model)
        for layer in self.weights:
            model.info.head((layer, 0))

    def keeping(self: _Self, **budget: Any) -> _Self:
        """The same predictor with one of `top`, `share`, `mass`, `threshold`, `like`."""
        return replace(self, **(dict.fromkeys(_BUDGETS) | budget))

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, whole or not at all; `lens.policies.load_trained` reads them.

        Raises:
            LensError: a budget that is another policy's.
            OSError: the place cannot be written.
        """
        if self.like is not None:
            raise LensError("a predictor that takes as many blocks as another policy has no file")
        tensors = {
            f"{layer}/{name}": one.contiguous()
            for layer, weights in self.weights.items()
            for name, one in weights.items()
        }
        (budget,) = (name for name in _BUDGETS if getattr(self, name) is not None)
        facts = {"kind": self.kind, "block_size": "{} {}".format(*self.block_size)}
        facts |= {budget: repr(getattr(self, budget))}
        write_atomically(
            as_path("path", path), lambda temporary: save_file(tensors, temporary, facts)
        )

    def __str__(self) -> str:
        budget = next(
            f"{name}={getattr(self, name)}" for name in _BUDGETS if getattr(self, name) is not None
        )
        return f"{type(self).__name__}({len(self.weights)} layers, {budget})"


_BUDGETS = ("top", "share", "mass", "threshold", "like")


DISTANCES = 32
"""Of `by_place`: powers of two, back and ahead."""


def by_place(weights: Weights, seen: Pooled) -> Tensor:
    """[n, query_blocks, key_blocks]: `weights["distance"]` [n, DISTANCES] of the power of two of each distance,
    and `weights["first"]` [n] of the first block."""
    far = seen.back.abs().clamp(min=1).float().log2().long() + (seen.back != 0)
    far = torch.where(seen.back < 0, far + DISTANCES // 2, far).clamp(max=DISTANCES - 1)
    is_first = torch.arange(far.shape[1], device=far.device) == 0
    return weights["distance"][:, far] + weights["first"][:, None, None] * is_first


def divergence(predicted: Tensor, target: Tensor, seen: Pooled) -> Tensor:
    """KL from `target` (rows need not sum to 1) to the softmax of `predicted` over the visible blocks, nats,
    mean over rows that see one."""
    total = target.sum(-1, keepdim=True)
    wanted = target / total.clamp(min=1e-30)
    logits = predicted.masked_fill(~seen.visible, -torch.inf)
    found = logits.log_softmax(-1).masked_fill(~seen.visible, 0)
    terms = torch.xlogy(wanted, wanted) - wanted * found
    return terms.sum(-1)[total[..., 0] > 0].mean()
