"""The residual stream between the layers of a model: read, and edited while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel
from lens.passes.calls import first_of, with_first
from lens.passes.inputs import Prompt
from lens.passes.sessions import base
from lens.passes.visit import Hooks

if TYPE_CHECKING:
    from jaxtyping import Float


@contextmanager
def layer_inputs(
    model: LoadedModel,
    take: Callable[[int, Tensor], None],
    layers: Sequence[nn.Module] | None = None,
) -> Iterator[None]:
    """`take(layer, hidden [batch, queries, width])` is called with what enters each layer.

    Args:
        model: as `lens.load` returns it.
        take: what is told of each.
        layers: of a stage; None: of the model.

    Raises:
        LensError: layers that are not found (`lens.models.layout.blocks`).
    """
    layers = layers or blocks(model)
    with ExitStack() as stack:
        hooks = Hooks(stack)
        for number, layer in enumerate(layers):
            hooks.before(layer, "enter", lambda hidden, number=number: take(number, hidden))
        yield


def stream(model: LoadedModel, prompt: Prompt) -> Float[Tensor, "states tokens width"]:
    """[layers + 1, tokens, width]: what enters layer 0, then what leaves each layer; float32, CPU.

    Raises:
        LensError: layers that are not found.
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        found.append(tensor[0].detach().float().cpu())

    layers = blocks(model)
    with ExitStack() as stack, torch.no_grad():
        hooks = Hooks(stack)
        for number, layer in enumerate(layers):
            hooks.before(layer, "enter", keep if number == 0 else lambda _: None)
            hooks.after(layer, "leave", lambda _, __, output: keep(first_of(output)))
        base(model)(**prompt.inputs)
    return torch.stack(found)


@contextmanager
def changed(model: LoadedModel, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, what leaves `layer` (-1: what enters layer 0) is `change` of it.

    Args:
        model: as `lens.load` returns it.
        layer: -1 to layers - 1.
        change: [batch, tokens, width] -> the same shape.

    Raises:
        LensError: a layer that is not there, or layers that are not found.
    """
    layers = blocks(model)
    if not -1 <= layer < len(layers):
        raise LensError(f"layer must be -1 to {len(layers) - 1}, got {layer}")

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return with_first(output, change(first_of(output)))

    with ExitStack() as stack:
        hooks = Hooks(stack)
        for number, module in enumerate(layers):
            if layer < 0:
                hooks.before(module, "enter", change if number == 0 else lambda _: None)
            else:
                hooks.after(module, "leave", after if number == layer else lambda *_: None)
        yield
