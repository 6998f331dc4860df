"""Which tokens of a model can be drawn, and what its tokenizer puts round a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lens.common.errors import LensError

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel


def ordinary_ids(model: LoadedModel) -> list[int]:
    """Ids of the tokens that can stand in a text: the tokenizer knows them, and they are not special.

    Raises:
        LensError: the model has no vocabulary.
    """
    if model.info.vocab is None:
        raise LensError(f"{model.name} has no vocabulary, so no tokens can be drawn")
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    vocabulary = getattr(model.tokenizer, "get_vocab", None)
    known = range(model.info.vocab) if vocabulary is None else set(vocabulary().values())
    return [index for index in range(model.info.vocab) if index in known and index not in special]


def around(model: LoadedModel) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text, such as BOS, or [CLS] and [SEP]."""
    start = [] if model.bos_id is None else [model.bos_id]
    if not hasattr(model.tokenizer, "num_special_tokens_to_add"):
        return start, []
    plain = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = model.encode("a")
    for at in range(len(whole) - len(plain) + 1):
        if plain and whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def split_special(
    ids: Sequence[int], pair: tuple[list[int], list[int]]
) -> tuple[list[int], list[int], list[int]]:
    """What of `pair`, as `around` gives it, stands before the ids of a text, the text's own, and behind."""
    start, end = pair
    first = len(start) if list(ids[: len(start)]) == start else 0
    last = len(ids) - (len(end) if list(ids[len(ids) - len(end) :]) == end else 0)
    return list(ids[:first]), list(ids[first:last]), list(ids[last:])


def windows(ids: Sequence[int], length: int, pair: tuple[list[int], list[int]]) -> list[list[int]]:
    """Consecutive windows of `length` tokens of a text, each between what stands round the whole text.

    The rest that fills no window is left out. `pair` as `around` gives it.

    Example:
        >>> windows([1, 5, 6, 7, 8, 9, 2], 4, ([1], [2]))
        [[1, 5, 6, 2], [1, 7, 8, 2]]
    """
    start, body, end = split_special(ids, pair)
    size = length - len(start) - len(end)
    if size < 1:
        return []
    cuts = range(0, len(body) - size + 1, size)
    return [[*start, *body[at : at + size], *end] for at in cuts]
