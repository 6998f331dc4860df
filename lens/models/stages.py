"""Vision models of several parts: stages with positions and heads of their own number (Swin, SegFormer, PVT), axes."""

from __future__ import annotations

from typing import Any

from torch import nn

from lens.models.stacks import attends, layers_of


def stages(model: Any) -> dict[str, list[nn.Module]]:
    """The layers of each stage, by "stage0", "stage1", ...; nothing of a model whose layers are one list.

    Of a TimeSformer, whose layers attend along the frames and then within each, what does so: "time" and "space".
    """
    if getattr(model, "main_input_name", None) != "pixel_values":
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
    return {f"stage{number}": layers for number, layers in enumerate(found)}


def _layers_within(module: nn.Module) -> list[nn.Module]:
    """The one list of attending modules that a stage is or holds; nothing where there is none."""
    inside = [module, *module.children()]
    lists = [one for one in inside if isinstance(one, nn.ModuleList) and len(one)]
    lists = [one for one in lists if all(map(attends, one))]
    return list(lists[0]) if len(lists) == 1 else []
