"""Where the attention and MLP sub-layers of a model are, and running it without some of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.sessions import transformer

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")


class SubLayers(NamedTuple):
    """Of one layer: `attention`, and `mlp` or None where it has none."""

    attention: nn.Module
    mlp: nn.Module | None


def blocks(model: LoadedModel) -> nn.ModuleList:
    """The layers of a model, each of which has its attention as a child.

    Raises:
        LensError: no such list.
    """
    count = model.info.layers
    if not model.is_bridge:
        for module in transformer(model).modules():
            if (
                isinstance(module, nn.ModuleList)
                and len(module) == count
                and all(_child(layer, _ATTENTION) is not None for layer in module)
            ):
                return module
    raise LensError(
        f"{model.info.class_name} has no list of {count} layers with a child named "
        f"{', '.join(_ATTENTION)}, so its sub-layers cannot be taken out; pass the transformers model"
    )


def sublayers(model: LoadedModel) -> list[SubLayers]:
    """The sub-layers of every layer, in order; errors as in `blocks`."""
    found = []
    for layer in blocks(model):
        attention = _child(layer, _ATTENTION)
        assert attention is not None
        found.append(SubLayers(attention, _child(layer, _MLP)))
    return found


def named_sublayers(model: LoadedModel) -> dict[str, nn.Module]:
    """`L0.attention`, `L0.mlp`, `L1.attention`, ... in order; errors as in `blocks`."""
    return {
        f"L{number}.{kind}": module
        for number, parts in enumerate(sublayers(model))
        for kind, module in parts._asdict().items()
        if module is not None
    }


@contextmanager
def without(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What these sub-layers return is 0 inside the block, so that the residual stream passes them by."""

    def zero(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [module.register_forward_hook(zero) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _child(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first child with one of these names."""
    return next(
        (child for name in names if (child := getattr(layer, name, None)) is not None), None
    )
