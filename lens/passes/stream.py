"""The residual stream between the layers of a model: read, and edited while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.sessions import base, transformer


def blocks(model: LoadedModel) -> nn.ModuleList:
    """The layers of a model, in order: the one list of modules that has as many as `model.info`.

    Raises:
        LensError: there is no such list, or there are several.
    """
    layers = model.info.layers
    lists = [
        module
        for name, module in transformer(model).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    outer = [one for one in lists if not any(_inside(one, other) for other in lists)]
    if len(outer) != 1:
        raise LensError(
            f"{model.info.class_name} has {len(outer)} lists of {layers} modules, and exactly one must "
            "be its layers; its residual stream cannot be found"
        )
    return outer[0]


def stream(model: LoadedModel, prompt: Prompt) -> torch.Tensor:
    """[layers + 1, tokens, width]: what enters layer 0, then what leaves each layer; float32, CPU.

    Raises:
        LensError: as in `blocks`.
    """
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> None:
        found.append(tensor[0].detach().float().cpu())

    layers = blocks(model)
    with ExitStack() as stack, torch.no_grad():
        before = layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        stack.callback(before.remove)
        for layer in layers:
            hook = layer.register_forward_hook(lambda _, __, output: keep(_tensor(output)))
            stack.callback(hook.remove)
        base(model)(**prompt.inputs)
    return torch.stack(found)


@contextmanager
def changed(
    model: LoadedModel, layer: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Inside the block, what leaves `layer` (-1: what enters layer 0) is `change` of it.

    Args:
        model: as `lens.load` returns it.
        layer: -1 to layers - 1.
        change: [batch, tokens, width] -> the same shape.

    Raises:
        LensError: a layer that is not there, and as in `blocks`.
    """
    layers = blocks(model)
    if not -1 <= layer < len(layers):
        raise LensError(f"layer must be -1 to {len(layers) - 1}, got {layer}")

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return change(output)
        return (change(output[0]), *output[1:])

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if layer < 0:
        hook = layers[0].register_forward_pre_hook(before, with_kwargs=True)
    else:
        hook = layers[layer].register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _inside(module: nn.Module, other: nn.Module) -> bool:
    return module is not other and any(module is child for child in other.modules())
