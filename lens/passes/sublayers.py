"""Sub-layers that can be left out: proved, of models outside the table, by a pass without them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.layout import SubLayers, blocks, is_known
from lens.models.layout import sublayers as found_sublayers
from lens.models.loaded import LoadedModel
from lens.passes.calls import first_of, with_first
from lens.passes.sessions import run
from lens.passes.tiny_inputs import tiny_inputs

_ALIKE = 1e-4
"""Tokens that differ by less, of the largest value, are one: the stream that told them apart is gone."""
_proved: WeakSet[nn.Module] = WeakSet()


def sublayers(model: LoadedModel) -> list[SubLayers]:
    """What writes to the stream in each layer, and does no more.

    Outside of the table, where parts are found by their names, they are proved once per model: with them at 0 the
    tokens of a short prompt must still differ in what leaves each layer.

    Raises:
        LensError: as `lens.models.layout.sublayers`; a part that gives the residual stream with what it writes to it
            (MPT, RoBERTa, ESM, MPNet), so that it would take the stream with it.
    """
    found, root = found_sublayers(model), model.model
    if is_known(model) or root in _proved:
        return found
    layers = blocks(model)
    lost = _first_without_stream(model, layers, [part for parts in found for part in parts if part])
    if lost is not None:
        parts = [part for part in found[lost] if part]
        alone = (one for one in parts if _first_without_stream(model, layers, [one]) is not None)
        named = type(next(alone, parts[0])).__name__
        raise LensError(
            f"{named} in layer {lost} of {model.info.class_name} gives the residual stream with what it writes to it, so "
            "that it cannot be taken out alone; lens.edits.Ablate takes its heads"
        )
    _proved.add(root)
    return found


def named_sublayers(model: LoadedModel) -> dict[str, nn.Module]:
    """`L0.attention`, `L0.mlp`, `L1.attention`, ... in order, of those that are found; errors as in `sublayers`."""
    return {
        f"L{number}.{kind}": module
        for number, parts in enumerate(sublayers(model))
        for kind, module in parts._asdict().items()
        if module is not None
    }


def _first_without_stream(
    model: LoadedModel, layers: list[nn.Module], out: Iterable[nn.Module]
) -> int | None:
    """The first layer after which the tokens of a short prompt are alike, with some modules at 0."""
    left: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        left.append(first_of(output))

    with ExitStack() as stack, torch.no_grad():
        for hook, modules in ((_to_zero, out), (keep, layers)):
            for module in modules:
                stack.callback(module.register_forward_hook(hook).remove)
        run(model, tiny_inputs(model))
    return next((number for number, one in enumerate(left) if _alike(one)), None)


def _to_zero(_: nn.Module, __: Any, output: Any) -> Any:
    return with_first(output, torch.zeros_like(first_of(output)))


def _alike(hidden: Tensor) -> bool:
    tokens = hidden.flatten(0, -2).float()
    return bool((tokens - tokens[:1]).abs().max() <= _ALIKE * tokens.abs().max())
