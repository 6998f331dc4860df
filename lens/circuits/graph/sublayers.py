"""The sub-layers of a model with mixers: which norm each reads through, and through which projection its heads write."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lens.common.errors import LensError
from lens.mixers.ablating import heads_of
from lens.mixers.reading import mixers_of
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel
from lens.passes.logits import logits_of

NO_STATE = {"use_cache": False}
"""RWKV-4 writes its state in place, which a backward pass does not survive."""


@dataclass(eq=False)
class Part:
    """Heads that write through one projection, or an MLP.

    Attributes:
        names: of its writers.
        modules: of an MLP those whose outputs are added (experts, and those that all share).
        output: of heads the projection that they write through, else None.
        after: the norm that the sum of the heads goes through before it is added, or None.
        scale: what is written is multiplied by it.
    """

    names: list[str]
    modules: list[nn.Module]
    output: nn.Module | None
    after: nn.Module | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class SubLayer:
    """What reads the stream as one, as `a0` or `m0`: the norm that it reads through, or what reads without one."""

    name: str
    reader: nn.Module
    parts: list[Part]


def ends(model: LoadedModel) -> tuple[nn.Module, nn.Module]:
    """The first layer, and the norm behind the last one."""
    layers = blocks(model)
    root: Any = model.transformer
    inside = {id(one) for layer in layers for one in layer.modules()}
    norms = [one for one in root.modules() if _is_norm(one) and id(one) not in inside]
    if len(norms) != 1:
        raise LensError(
            f"{model.info.class_name} has {len(norms)} norms outside of its layers, and one must come before its logits; "
            "its edges are not known here"
        )
    return layers[0], norms[0]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _has_a_say(module: nn.Module) -> bool:
    """Whether a module is a norm or has weights."""
    return _is_norm(module) or any(True for _ in module.parameters())


def sublayers(model: LoadedModel) -> tuple[nn.Module | None, list[SubLayer]]:
    """The norm inside the first layer that the stream begins behind (RWKV-4) or None; norms with what runs behind each."""
    mixers = {id(module) for _, module in mixers_of(model.transformer)}
    counts = Counter(head.layer for head in heads_of(model))
    layers = blocks(model)
    found: list[SubLayer] = []
    opening = None
    for number, (layer, ran) in enumerate(zip(layers, _ran(model, layers), strict=True)):
        children = set(layer.children())
        steps = [one for one in ran if one in children and _has_a_say(one)]
        if number == 0 and len(steps) > 1 and all(map(_is_norm, steps[:2])):
            opening = steps[0]
        for reader, modules, after in _read_as_one(steps):
            mixing = [one for one in modules if any(id(part) in mixers for part in one.modules())]
            first = all(one.name != f"a{number}" for one in found)
            attends = number in model.info.attending and first
            softmax = [one for one in modules if one not in mixing][:1] if attends else []
            name = f"{'a' if mixing or softmax else 'm'}{number}"
            parts = []
            for module in [one for one in modules if one in mixing or one in softmax]:
                heads = counts[number] if module in mixing else model.info.heads
                letter = "s" if module in mixing and attends else "h"
                names = [f"{name}.{letter}{head}" for head in range(heads)]
                parts.append(Part(names, [module], _output(module, heads, ran), after))
            if not parts:
                parts = [Part([name], modules if after is None else [after], None)]
            found.append(SubLayer(name, reader, parts))
    return opening, found


def _read_as_one(
    steps: list[nn.Module],
) -> list[tuple[nn.Module, list[nn.Module], nn.Module | None]]:
    """Of the modules of a layer in their order: what reads the stream, what runs behind it, and a norm behind that."""
    found: list[tuple[nn.Module, list[nn.Module], nn.Module | None]] = []
    if steps and not _is_norm(steps[0]):  # each module, then its norm
        for module, norm in itertools.pairwise(steps):
            if _is_norm(norm) and not _is_norm(module):
                found.append((module, [module], norm))
        return found
    for one in steps:
        if _is_norm(one):
            found.append((one, [], None))
        else:
            found[-1][1].append(one)
    return [one for one in found if one[1]]


def _ran(model: LoadedModel, layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Of each layer its children and all its linear modules, in the order in which they run."""
    found: list[list[nn.Module]] = [[] for _ in layers]
    with ExitStack() as stack, torch.no_grad():
        for layer, own in zip(layers, found, strict=True):
            linear = (one for one in layer.modules() if isinstance(one, nn.Linear))
            for one in {*layer.children(), *linear}:
                stack.callback(one.register_forward_pre_hook(_adding(own)).remove)
        logits_of(model, torch.zeros(1, 3, dtype=torch.long, device=model.device), **NO_STATE)
    return found


def _adding(found: list[nn.Module]) -> Callable[[nn.Module, Any], None]:
    def add(module: nn.Module, _: Any) -> None:
        found.append(module)

    return add


def _output(module: nn.Module, heads: int, ran: list[nn.Module]) -> nn.Module:
    """The projection that the heads of a sub-layer write through: its linear module that runs last."""
    inside = set(module.modules())
    linear = [one for one in ran if one in inside and isinstance(one, nn.Linear)]
    if not linear or linear[-1].in_features % heads:
        raise LensError(
            f"where the {heads} heads of {type(module).__name__} write is not known here, so their edges cannot be replaced"
        )
    return linear[-1]
