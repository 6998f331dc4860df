"""`bare`: the transformers model inside a `TransformerBridge`, with the bridge's weights and without its parts.

TransformerLens 4 puts a component of its own round each module of the model that it wraps. Here the tree
of modules is copied without them; parameters and buffers are those of the bridge, not copies (but for
GPT-2's joint projection, which the bridge has split).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.sizes import describe

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TOKENS = 11


def bare(model: LoadedModel) -> LoadedModel:
    """The model itself, or what a bridge wraps, checked to give the bridge's logits.

    Raises:
        LensError: the bridge computes something else than the model that it wraps.
    """
    if not model.is_bridge:
        return model
    root = model.transformer
    if not hasattr(root, "config"):
        raise LensError(
            f"{model.name} is a TransformerBridge of {type(root).__name__}, which is no transformers "
            "model; load its weights as one (lens.load of a folder or of a model object)"
        )
    clone = _without_bridges(root, {})
    ids = torch.arange(min(_TOKENS, model.info.vocab or _TOKENS), device=model.device)[None]
    with torch.no_grad():
        theirs, ours = model.model(ids).double(), clone(ids).logits.double()
    difference = float((theirs - ours).abs().max() / theirs.abs().max())
    if not difference <= _TOLERANCE[model.dtype]:
        raise LensError(
            f"{model.name} is a TransformerBridge whose logits differ from those of the model that it "
            f"wraps, by {difference:.1e}: it has hooks, or weights that were processed in a way that is "
            "not known here; remove them, or pass the bridge as it was booted"
        )
    info = replace(
        describe(clone, model.info.licence),
        attending=model.info.attending,
        twice=model.info.twice,
    )
    return replace(model, model=clone, info=info)


def _without_bridges(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of the tree that shares its tensors; a module that is there twice stays one."""
    outer = module
    while module._modules.get("_original_component") is not None:
        module = module.get_submodule("_original_component")
    if id(module) not in made:
        clone = made[id(module)] = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, dict):  # of modules, parameters and hooks
                vars(clone)[name] = value.copy()
        for name, child in module.named_children():
            clone._modules[name] = _without_bridges(child, made)
        _join(outer, clone)
    return made[id(module)]


def _join(attention: nn.Module, clone: nn.Module) -> None:
    """GPT-2: the bridge has split q, k and v, and processes these weights alone."""
    parts = dict(attention.named_children())
    if not {"q", "k", "v", "qkv"} <= parts.keys():
        return
    joint = clone.get_submodule(str(parts["qkv"].name))
    if isinstance(joint, nn.Linear):  # GPT-NeoX: heads side by side, as they were
        return
    split = [parts[name].get_submodule("_original_component") for name in "qkv"]
    for kind, axis in (("weight", 1), ("bias", 0)):
        own = [part.get_parameter(kind).detach() for part in split]
        whole = torch.cat([part.T if axis else part for part in own], axis)
        setattr(joint, kind, nn.Parameter(whole, requires_grad=False))
