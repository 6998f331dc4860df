"""Which tokens of a model can be drawn, and what its tokenizer puts round a text."""

from __future__ import annotations

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
    if getattr(model.tokenizer, "build_inputs_with_special_tokens", None) is None:
        return start, []
    plain = list(model.tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = model.encode("a")
    for at in range(len(whole) - len(plain) + 1):
        if plain and whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []
