"""What all interventions have in common: small frozen objects, checked when they are made, run by `lens.edit`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from lens.common.choices import check_lists, is_number
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits.base import AttentionEdit, selected_heads
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys, check_keys, positions_of

if TYPE_CHECKING:
    from jaxtyping import Bool


class Edit(ABC):
    """One intervention; `lens.edit(model, ...)` runs it."""

    @property
    def dose(self) -> float:
        """How much of it: its amount; NaN where it has none."""
        return getattr(self, "amount", math.nan)

    @property
    def idle(self) -> float:
        """The amount that changes nothing."""
        return 0.0

    def at(self, amount: float) -> Self:
        """The same by another amount.

        Raises:
            LensError: it has none, or not this one.
        """
        if "amount" not in {one.name for one in fields(self)}:  # type: ignore[arg-type]
            raise LensError(f"{self.words} has no amount; leave amounts out")
        return replace(self, amount=amount)  # type: ignore[type-var]

    @property
    def words(self) -> str:
        """What it does, in a few words, such as "Mask first"; not where."""
        return type(self).__name__

    def ready(self, model: LoadedModel, prompts: Any) -> Edit:
        """The same with what it needs of all prompts read, over `prompts` where it names none."""
        return self

    def kind(self, model: LoadedModel) -> Any:
        """Its `lens.edits.controls.Kind`, of an edit that brings its own; None: the room knows it."""
        return None

    @abstractmethod
    def start(self, model: LoadedModel, backend: str) -> Running:
        """What carries it out in this model.

        Raises:
            LensError: layers, heads or dimensions that the model has not got.
        """


@dataclass(frozen=True)
class OfHeads(Edit):
    """An edit of the attention of `heads`, or of all heads of `layers`; neither: of all."""

    heads: Sequence[AnyHead] | None = field(default=None, kw_only=True)
    layers: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.heads is not None and self.layers is not None:
            raise LensError("give layers or heads, not both; heads name their layer: 'L3H5'")
        if isinstance(self.heads, str):
            raise LensError(
                f"heads must be a list of heads, got {self.heads!r}; write [{self.heads!r}]"
            )
        if isinstance(self.layers, int):
            raise LensError(
                f"layers must be a list of numbers, got {self.layers!r}; write [{self.layers}]"
            )
        for name in ("heads", "layers"):
            if (given := getattr(self, name)) is not None:
                check_lists(**{name: given})
                object.__setattr__(self, name, tuple(given))

    def chosen(self, model: LoadedModel) -> Bool[torch.Tensor, "layers heads"]:
        """bool [layers, heads]: those that it edits.

        Raises:
            LensError: the model has not got them.
        """
        return selected_heads(model, self.layers, self.heads)


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


class Hooked:
    """What an edit outside of attention did.

    Attributes:
        calls: how often it changed what a module gave.
    """

    def __init__(self) -> None:
        self.calls = 0


def plain_keys(name: str, keys: Keys) -> Keys:
    """Checked keys; positions in any form become a tuple of integers.

    Raises:
        LensError: as `lens.passes.keys.check_keys`.
    """
    check_keys(name, keys)
    return keys if isinstance(keys, str) or callable(keys) else positions_of(keys)


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises LensError unless `value` is a number from `low` to `high`."""
    if not is_number(value) or math.isnan(value):
        raise LensError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        shown = "is a fraction 0..1" if (low, high) == (0, 1) else f"must be {low:g} to {high:g}"
        raise LensError(f"{name} {shown}, got {value}")
