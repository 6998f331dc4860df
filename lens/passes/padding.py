"""Padding in front of a prompt: cut off where the model then computes the same, and never closed up where it does not.

Models with positions that count from the first token of the row (GPT-2, BERT) put a prompt elsewhere when padding
stands before it; of others (rotary, ALiBi, positions made of the mask) nothing changes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.sessions import run


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
    own = _states(model, padded)[:, start : start + length]
    tried = [dict(cut)]
    if places:
        at = torch.arange(start, start + length, device=own.device)[None]
        tried.append({**cut, "position_ids": at})
    for inputs in tried:
        try:
            found = _states(model, inputs)
        except LensError:  # it takes no positions
            continue
        limit = torch.finfo(found.dtype).eps ** 0.5
        if bool((found - own).abs().max() <= limit * own.abs().max()):
            return inputs
    raise LensError(
        f"{model.info.class_name} puts a prompt at other positions when {start} tokens of padding stand before it, so "
        "that the prompt alone is not what it reads; pad behind it (padding_side='right'), give position_ids, or pass "
        "the prompts as a list"
    )


def _states(model: LoadedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    found = run(model, inputs)
    return found if isinstance(found, Tensor) else found[0]
