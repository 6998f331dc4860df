"""Models of several parts: stages with positions and heads of their own number (Swin, SegFormer, PVT, Canine), axes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lens.models.stacks import attends, layers_of
from lens.models.wrapped import Wrapped


def stages(model: Any) -> dict[str, list[nn.Module]]:
    """The layers of each stage, by "stage0", "stage1", ...; nothing of a model whose layers are one list.

    Of a TimeSformer, whose layers attend along the frames and then within each, what does so: "time" and "space". Of a Canine
    "initial" and "final", of characters, and between them "molecules". A layer of Hiera that pools its queries has the keys
    of the stage before, so it is a part of its own: "pool1". Of a wrapped module what was found or named when it was wrapped.
    """
    if isinstance(model, Wrapped):
        return model.parts
    base: Any = getattr(model, "base_model", model)
    if hasattr(base, "initial_char_encoder"):
        ends = base.initial_char_encoder, base.encoder, base.final_char_encoder
        return {
            name: list(one.layer)
            for name, one in zip(("initial", "molecules", "final"), ends, strict=True)
        }
    takes = inspect.signature(model.forward).parameters
    alone = "pixel_values" in takes and "input_ids" not in takes
    if getattr(model, "main_input_name", None) != "pixel_values" and not alone:
        return {}
    layers: list[Any] = layers_of(model)
    if layers and all(hasattr(one, "temporal_attention") for one in layers):
        return {
            "time": [one.temporal_attention for one in layers],
            "space": [one.attention for one in layers],
        }
    found = [_layers_within(one) for one in layers]
    if not all(found):
        return {}
    parts: dict[str, list[nn.Module]] = {}
    for number, layers in enumerate(found):
        pools = [one for one in layers if getattr(one, "query_stride", 1) > 1]
        parts |= {f"pool{number}": pools} if pools else {}
        parts[f"stage{number}"] = [one for one in layers if one not in pools]
    return {name: layers for name, layers in parts.items() if layers}


def _layers_within(module: nn.Module) -> list[nn.Module]:
    """The one list of attending modules that a stage is or holds; nothing where there is none."""
    inside = [module, *module.children()]
    lists = [one for one in inside if isinstance(one, nn.ModuleList) and len(one)]
    lists = [one for one in lists if all(map(attends, one))]
    return list(lists[0]) if len(lists) == 1 else []
