"""Padding in front of a prompt: cut off where the model then computes the same, and never closed up where it does not.

Models with positions that count from the first token of the row (GPT-2, BERT) put a prompt elsewhere when padding
stands before it; of others (rotary, ALiBi, positions made of the mask) nothing changes. Which it is, two passes show:
once per model, for the same inputs and the same padding.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import first_of
from lens.passes.sessions import run

_BY_LENGTH = ("dynamic", "longrope", "block_sparse", "attention_window", "block_size", "compress_r")
"""In a configuration: what a token reads depends on how long its row is, or on where blocks begin."""
_proved: WeakKeyDictionary[nn.Module, dict[Any, int]] = WeakKeyDictionary()


@torch.no_grad()
def without_padding_before(
    model: LoadedModel,
    padded: Mapping[str, Tensor],
    cut: Mapping[str, Tensor],
    start: int,
    places: bool,
) -> dict[str, Tensor]:
    """What stands for a padded prompt: the inputs that were cut, where needed with the positions that it had.

    Args:
        model: whose output decides.
        padded: one row of every input, whole.
        cut: the same without the padding before and behind it.
        start: how many tokens of padding stand before it.
        places: whether positions may be given.

    Raises:
        LensError: neither gives what the model makes of the padded row.
    """
    length = cut["input_ids"].shape[1]
    tried = [dict(cut)]
    if places:
        at = torch.arange(start, start + length, device=cut["input_ids"].device)[None]
        tried.append({**cut, "position_ids": at})
    known = _proved.setdefault(model.model, {})
    before = frozenset(padded["input_ids"][0, :start].tolist())
    key = (state_of(model.model), frozenset(padded), before, places)
    if key in known:
        return tried[known[key]]
    own = first_of(run(model, padded))[:, start : start + length]
    for number, inputs in enumerate(tried):
        try:
            found = first_of(run(model, inputs))
        except LensError:  # it takes no positions
            continue
        limit = torch.finfo(found.dtype).eps ** 0.5
        if bool((found - own).abs().max() <= limit * own.abs().max()):
            if not any(word in str(getattr(model.model, "config", "")) for word in _BY_LENGTH):
                known[key] = number
            return inputs
    raise LensError(
        f"{model.info.class_name} puts a prompt at other positions when {start} tokens of padding stand before it, so "
        "that the prompt alone is not what it reads; pad behind it (padding_side='right'), give position_ids, or pass "
        "the prompts as a list"
    )


def state_of(root: nn.Module) -> int:
    """Changes when a module or a hook is put in or taken out."""
    return hash(
        tuple(
            (
                id(part),
                tuple(part._forward_hooks),
                tuple(part._forward_pre_hooks),
                id(vars(part).get("forward")),  # put over that of its class
            )
            for part in root.modules()
        )
    )
