"""Any `nn.Module` in the place of a transformers model: its inputs by name, one tensor out, its layers of attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

from lens.common.errors import LensError


class Wrapped(nn.Module):
    """Runs a module that `lens.passes.wrap` was given.

    Attributes:
        module: that was given.
        attending: its modules that attend, in the order of their layers.
        main_input_name: the first argument of its forward pass; token ids may be passed as `input_ids` too.
        example: inputs that it takes, by name.
        following: puts an attention in the place of theirs where that cannot be followed: (modules, attend) -> a
            context; None where it can.
        heads: of attention that folds them into the batch and does not say how many.
        parts: those of `attending` that go together where the module has several rows of positions, by name; else empty.
        crossing: `id` of modules that read keys of another row of positions.
        config: None: there is none.
    """

    config = None

    def __init__(
        self, module: nn.Module, attending: Sequence[nn.Module], inputs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.module = module
        self.attending = tuple(attending)
        self.example = dict(inputs)
        self.following: Any = None
        self.heads: int | None = None
        self.parts: dict[str, list[nn.Module]] = {}
        self.crossing: frozenset[int] = frozenset()
        self.main_input_name = first_argument(module)
        inner = type(module).forward

        @wraps(inner)
        def forward(_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        self.forward = MethodType(forward, module)  # its signature says which inputs there are

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor where it gives several."""
        if "input_ids" in kwargs and "input_ids" not in inspect.signature(self.forward).parameters:
            kwargs = {self.main_input_name: kwargs.pop("input_ids"), **kwargs}
        found = self.module(*args, **kwargs)
        first = next(iter(found), None) if isinstance(found, tuple | list) else None
        return first if isinstance(first, torch.Tensor) else found

    def generate(self, *_: Any, **__: Any) -> Any:
        """Raises LensError: writing on is the business of the module's own code."""
        raise LensError(
            f"{type(self.module).__name__} is no transformers model, so lens cannot generate with it; call its "
            "own generation inside lens.edit or lens.traces.capturing"
        )


def first_argument(module: nn.Module) -> str:
    """The first argument of the forward pass of a module."""
    return next(iter(inspect.signature(module.forward).parameters), "input_ids")
