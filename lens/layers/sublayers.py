"""Where the attention and MLP sub-layers of a model are, whose outputs are added to the residual stream."""

from typing import NamedTuple

from torch import nn

from lens.captures.recorder import transformer
from lens.errors import LensError
from lens.models.loaded import LoadedModel

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")


class SubLayers(NamedTuple):
    """Of one layer: `attention`, and `mlp` or None where it has none."""

    attention: nn.Module
    mlp: nn.Module | None


def sublayers(model: LoadedModel) -> list[SubLayers]:
    """The sub-layers of every layer, in order.

    They are looked for by name in the list of layers.

    Raises:
        LensError: no such list, or layers without a known attention.
    """
    count = model.info.layers
    if not model.is_bridge:
        for module in transformer(model).modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                found = [SubLayers(_child(m, _ATTENTION), _child(m, _MLP)) for m in module]
                if all(part.attention is not None for part in found):
                    return found
    raise LensError(
        f"{model.info.class_name} has no list of {count} layers with a child named "
        f"{', '.join(_ATTENTION)}, so its sub-layers cannot be taken out; pass the transformers model"
    )


def _child(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The first child with one of these names, None if there is none."""
    return next(
        (child for name in names if (child := getattr(layer, name, None)) is not None), None
    )  # type: ignore[return-value]
