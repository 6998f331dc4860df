"""What all interventions have in common: small frozen objects, checked when they are made, run by `lens.edit`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits.base import AttentionEdit
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys, check_keys


class Edit(ABC):
    """One intervention; `lens.edit(model, ...)` runs it."""

    @abstractmethod
    def start(self, model: LoadedModel, backend: str) -> Running:
        """What carries it out in this model.

        Raises:
            LensError: layers, heads or dimensions that the model has not got.
        """


@dataclass(frozen=True, eq=False)
class Running:
    """An edit that has been started.

    Attributes:
        done: what `lens.edit` yields for it: the counters.
        attention: the same where it edits attention, else None.
        hooks: to be open while the model runs.
    """

    done: Any
    attention: AttentionEdit | None = None
    hooks: AbstractContextManager[Any] = field(default_factory=nullcontext)


def plain_keys(name: str, keys: Keys) -> Keys:
    """Checked keys; positions in any form become a tuple of integers.

    Raises:
        LensError: as `lens.passes.keys.check_keys`.
    """
    check_keys(name, keys)
    if isinstance(keys, str) or (callable(keys) and not isinstance(keys, torch.Tensor)):
        return keys
    if isinstance(keys, torch.Tensor):
        return tuple((keys.nonzero()[:, 0] if keys.dtype == torch.bool else keys).tolist())
    return tuple(keys)


def plain_places(
    heads: Sequence[AnyHead] | None, layers: Sequence[int] | None
) -> tuple[tuple[AnyHead, ...] | None, tuple[int, ...] | None]:
    """Heads and layers as tuples.

    Raises:
        LensError: both are given, or one name where a list of names belongs.
    """
    if heads is not None and layers is not None:
        raise LensError("give layers or heads, not both; heads name their layer: 'L3H5'")
    if isinstance(heads, str):
        raise LensError(f"heads must be a list of heads, got {heads!r}; write [{heads!r}]")
    if isinstance(layers, int):
        raise LensError(f"layers must be a list of numbers, got {layers!r}; write [{layers}]")
    return None if heads is None else tuple(heads), None if layers is None else tuple(layers)


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises LensError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise LensError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        shown = "is a fraction 0..1" if (low, high) == (0, 1) else f"must be {low:g} to {high:g}"
        raise LensError(f"{name} {shown}, got {value}")
