"""What token ids are, and which of them a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lens.common.choices import is_whole
from lens.common.errors import LensError


def is_ids(prompt: Any) -> bool:
    """Whether this is the token ids of one prompt: integers in a sequence, a tensor or an array."""
    if isinstance(prompt, torch.Tensor):
        return prompt.dim() == 1 and not prompt.is_floating_point() and prompt.dtype != torch.bool
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(map(is_whole, prompt))


def shape_of(prompt: Any) -> str:
    """What was given, in an error."""
    if isinstance(prompt, torch.Tensor):
        return f"a {prompt.dtype} tensor {list(prompt.shape)}"
    if isinstance(prompt, list | tuple) and prompt:
        odd = next((one for one in prompt if not is_whole(one)), prompt[0])
        return f"a {type(prompt).__name__} with a {type(odd).__name__}"
    return type(prompt).__name__


def length_of(given: Any) -> int | None:
    """How many things stand in this; None where it is one: a text, a number, an array of no axis."""
    if isinstance(given, str | bytes):
        return None
    try:
        return len(given)
    except TypeError:
        return None


def numbers_of(ids: Any) -> list[int]:
    """Token ids as plain numbers.

    Raises:
        LensError: something that is no row of numbers from 0.
    """
    try:
        numbers = [int(index) for index in ids]
    except (TypeError, ValueError) as error:
        raise LensError(f"token ids must be a list of integers, got {shape_of(ids)}") from error
    if numbers and min(numbers) < 0:
        raise LensError(f"token ids go from 0, got {min(numbers)}")
    return numbers


def check_text(text: Any) -> None:
    """Raises LensError unless this is a text with something in it."""
    if not isinstance(text, str):
        raise LensError(f"a text must be a string, got {shape_of(text)}")
    if not text.strip():
        raise LensError("the text is empty; pass a text with at least one token")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise LensError(
            "the text holds half a character (a lone surrogate), which no tokenizer reads; decode it with "
            "errors='replace'"
        )


def check_ids(ids: Any, name: str, vocab: int | None, context: int | None) -> None:
    """Token ids that a model can take; `name`, `vocab` and `context` are the model's.

    Raises:
        LensError: none, too many, or ids outside the vocabulary; a text, or anything else.
    """
    is_empty = length_of(ids) == 0
    if not is_empty and not is_ids(ids):
        raise LensError(
            f"token ids must be a list of integers, got {shape_of(ids)}; of a text they are model.encode(text)"
        )
    if is_empty:
        raise LensError("the prompt has no tokens; pass at least one")
    if context is not None and len(ids) > context:
        raise LensError(
            f"the prompt has {len(ids):,} tokens and {name} takes {context:,}; "
            f"shorten it: lens.tasks.take(model, text, {context})"
        )
    ends = ids.aminmax() if isinstance(ids, torch.Tensor) else (min(ids), max(ids))
    least, most = map(int, ends)
    if vocab is not None and not 0 <= least <= most < vocab:
        raise LensError(f"token ids of {name} go from 0 to {vocab - 1}, got {least} to {most}")
