"""What enters each layer of the language model, seen while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.interface import language_model
from lens.passes.sessions import transformer


def decoder_layers(model: LoadedModel) -> list[nn.Module]:
    """The layers of the language model, in order.

    Raises:
        LensError: no list of as many layers as the model has.
    """
    root = language_model(transformer(model))
    for part in root.modules():
        if isinstance(part, nn.ModuleList) and len(part) == model.info.layers:
            return list(part)
    raise LensError(
        f"{model.info.class_name} keeps no list of its {model.info.layers} layers, so what enters them "
        "cannot be read; give the sinks as positions"
    )


@contextmanager
def layer_inputs(model: LoadedModel, take: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """`take(layer, hidden [batch, queries, width])` is called with what enters each layer.

    Raises:
        LensError: as `decoder_layers`.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(decoder_layers(model)):

            def hook(
                _: nn.Module, args: tuple, kwargs: dict[str, Any], number: int = number
            ) -> None:
                take(number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
