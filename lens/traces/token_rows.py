"""What can be said of a row of tokens without any attention: which are delimiters, how far their copies are."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from lens.models.tokens import is_special

_CONTINUES = "##"


def is_delimiter(token: str) -> bool:
    """Whether a token is punctuation alone, or a line break; spaces around do not matter."""
    marks = token.strip()
    if not marks:
        return "\n" in token
    return all(unicodedata.category(mark).startswith("P") for mark in marks)


def nearest_copy(
    ids: np.ndarray, *, skip_first: bool = False, both_ways: bool = False
) -> np.ndarray:
    """[tokens] distance to the nearest earlier copy of each token, inf where there is none.

    Args:
        ids: token ids.
        skip_first: a copy at position 0 does not count.
        both_ways: later copies count too.
    """
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    gap = np.where(same, np.diff(order), np.inf)
    distance = np.full(len(ids), np.inf)
    distance[order[1:]] = np.where((order[:-1] == 0) & skip_first, np.inf, gap)
    if both_ways:
        distance[order[:-1]] = np.minimum(distance[order[:-1]], gap)
    return distance


def token_classes(tokens: Sequence[str]) -> list[str]:
    """Of each token of a row "first", "delimiter", "number", "word" (a word, or how one begins) or "piece" (how one goes on).

    In a row without any space each token is a word of its own, as symbols are, but WordPiece's "##".
    """
    found: list[str] = []
    whole = not any(one.isspace() for token in tokens for one in token)
    opens = True  # whether the next token begins a word
    for place, token in enumerate(tokens):
        text = token.strip()
        if is_delimiter(token) or not text:
            found.append("delimiter")
        elif text.isnumeric():
            found.append("number")
        elif text.startswith(_CONTINUES) and len(text) > len(_CONTINUES):
            found.append("piece")
        else:
            found.append("word" if whole or opens or token[0].isspace() else "piece")
        opens = found[-1] == "delimiter" or token[-1:].isspace()
        opens = opens or (place == 0 and is_special(token))  # behind a BOS
    return ["first", *found[1:]] if found else []
