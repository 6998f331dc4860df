"""The two halves of an encoder-decoder, and the layers of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lens.models.sizes import reads_pictured_text

_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Stacks:
    """The halves of an encoder-decoder; `encoder` is None where its states are an input (Q-Former)."""

    encoder: nn.Module | None
    decoder: nn.Module


def stacks(model: Any) -> Stacks | None:
    """The halves of a transformers model that is an encoder-decoder; None of any other."""
    takes = inspect.signature(model.forward).parameters
    if reads_pictured_text(model):  # BLIP-2 takes a decoder's input too, for other language models
        return None
    if "decoder_input_ids" in takes:
        encoder, decoder = model.get_encoder(), model.get_decoder()
        is_whole = encoder is not decoder and model not in (encoder, decoder)
        return Stacks(encoder, decoder) if is_whole else None
    base = getattr(model, "base_model", model)
    for names in (("vision_model", "text_decoder"), ("encoder", "decoder")):
        first, second = (getattr(base, name, None) for name in names)
        if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
            continue
        if crossing(second):
            return Stacks(first, second)
    if {"query_embeds", "encoder_hidden_states"} <= takes.keys() and crossing(model):
        return Stacks(None, model)
    return None


def crossing(root: nn.Module) -> frozenset[int]:
    """`id` of the modules inside whose name says that they read another sequence (`encoder_attn`, `crossattention`)."""
    return frozenset(
        id(module) for name, module in root.named_modules() if _CROSS.search(name) is not None
    )


def layers_of(stack: nn.Module) -> list[nn.Module]:
    """The layers of a half: its longest list of modules that all attend."""
    outer = outermost(
        one
        for one in stack.modules()
        if isinstance(one, nn.ModuleList) and len(one) and all(map(attends, one))
    )
    return list(max(outer, key=len)) if outer else []


def outermost(lists: Iterable[nn.ModuleList]) -> list[nn.ModuleList]:
    """Those that lie in none of the others."""
    several = list(lists)
    return [
        one
        for one in several
        if not any(one is not other and one in list(other.modules()) for other in several)
    ]


def attends(module: nn.Module) -> bool:
    """Whether anything inside is named attention."""
    return any("att" in type(one).__name__.lower() for one in module.modules())
