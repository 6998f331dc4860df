"""How single tokens look, and whether a tokenizer is the model's own."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import Any

from lens.common.errors import LensError

_FEWEST, _MOST = 0.5, 1.1
"""How many times as many tokens as the model a tokenizer knows: vocabularies are padded, not doubled, and some add
tokens that no model has learnt."""
_SPECIAL = re.compile(r"<[^<>]+>|\[\w+\]")


def readable(tokenizer: Any, token: str | None, index: int) -> str:
    """A token as it looks in a text, with its spaces.

    Bytes that are no whole character stand as `<0xE4>`, and an id that the tokenizer does not know as
    `<id 157>`, so that different tokens look different.
    """
    if token is None:
        return f"<id {index}>"
    if "▁" in token:  # sentencepiece: its decoder would drop a leading space
        return token.replace("▁", " ")
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(byte[1], 16)]).decode("utf-8", errors="lens.bytes")
    text = tokenizer.convert_tokens_to_string([token])
    if "\ufffd" not in text or not all(letter in _byte_of() for letter in token):
        return text
    return bytes(map(_byte_of().__getitem__, token)).decode("utf-8", errors="lens.bytes")


def is_special(token: str) -> bool:
    """Whether a token is one mark between brackets, such as `<s>`, `<|en|>` or `[CLS]`; spaces around do not matter.

    Tags in a row, such as `<b><i>`, are text.
    """
    return _SPECIAL.fullmatch(token.strip()) is not None


def check_fit(tokenizer: Any, vocab: int | None, name: str) -> None:
    """The tokenizer can be the model's own.

    Raises:
        LensError: it knows far fewer or far more tokens than the model.
    """
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocab is None or vocabulary is None:
        return
    count = len(vocabulary())
    if not _FEWEST * vocab <= count <= _MOST * vocab:
        raise LensError(
            f"the tokenizer of {name} has {count:,} entries and the model {vocab:,}: it is not the model's "
            "own; put the right one into its folder, or give it: lens.load(..., tokenizer=...)"
        )


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Letters by which GPT-2's kind of tokenizer writes bytes: those that can be seen stand for themselves."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _as_hexadecimal(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    wrong = error.object[error.start : error.end]
    return "".join(f"<0x{byte:02X}>" for byte in wrong), error.end


codecs.register_error("lens.bytes", _as_hexadecimal)
