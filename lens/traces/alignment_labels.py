"""Labels of an alignment: which places of a source a place of the target stands for, in numbers, words or seconds."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import numpy as np

from lens.common.choices import check_lists, is_whole
from lens.common.errors import LensError
from lens.models.tokens import is_special
from lens.traces.trace import AttentionTrace

Labels: TypeAlias = (
    Mapping[int, int | Sequence[int] | tuple[float, float]]
    | Mapping[str, str | Sequence[str] | tuple[float, float]]
    | Sequence[tuple[int | str, int | str]]
)
"""Position in the target -> position or positions in the source; or pairs (target, source). Others are not scored.

A position may be a word of that side, whose tokens it stands for. Of a sound also position -> (start, end) in
seconds, floating numbers.
"""
At = Literal["read", "predicted"]

_SPACELESS = re.compile(  # Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
)


def rows_of(trace: AttentionTrace, labels: Labels | None, at: At) -> dict[int, list[int]]:
    """Row -> labelled keys.

    Args:
        trace: of cross-attention.
        labels, at: of `alignment`.

    Raises:
        LensError: labels that do not fit, or a word that is not there, or more than once.
    """
    if labels is None:
        return {}
    pairs: Any = labels.items() if isinstance(labels, Mapping) else labels
    if not isinstance(labels, Mapping):
        check_lists(labels=labels)
    found: dict[int, list[int]] = {}
    for pair in pairs:
        targets, keys = _pair(trace, pair)
        for token in targets:
            if not 0 <= token < trace.queries + (at == "predicted"):
                raise LensError(f"the target has positions 0 to {trace.queries - 1}, got {token}")
            if not all(0 <= key < trace.length for key in keys):
                raise LensError(f"the source has positions 0 to {trace.length - 1}, got {keys}")
            if (row := token - (at == "predicted")) >= 0:
                found.setdefault(row, []).extend(keys)
    return found


def _pair(trace: AttentionTrace, pair: Any) -> tuple[list[int], list[int]]:
    """Positions of the target, and of the source."""
    try:
        token, source = pair
        words = [source] if isinstance(source, str) else source
        if isinstance(words, list | tuple) and words and all(isinstance(one, str) for one in words):
            source = [key for word in words for key in places_of(trace.tokens, word, "source")]
        if isinstance(token, str):
            targets = places_of(trace.query_tokens, token, "target")
        else:
            targets = [int(token)] if is_whole(token) else []
        keys = np.asarray(source)
    except (TypeError, ValueError):
        targets, keys = [], np.array(None)
    if keys.dtype.kind == "f" and (step := trace.attrs.get("seconds_per_position")):
        keys = _moments(keys, step, trace.length)
    if not targets or keys.dtype.kind not in "iu" or not keys.size:
        raise LensError(
            "labels are a mapping target -> source or pairs (target, source), in whole numbers or words, got "
            f"{pair!r}"
        )
    return targets, keys.ravel().tolist()


def places_of(tokens: Sequence[str], word: str, side: str) -> list[int]:
    """Positions of the tokens that spell a word, or several words in a row.

    Raises:
        LensError: it is not among them, or more than once; `side` says where, "source" or "target".
    """
    pieces = [" " if is_special(one) else one for one in tokens]
    wanted = word.strip()
    letters = re.escape(wanted)
    if any(one.startswith("##") for one in pieces):  # WordPiece has no spaces
        pieces = [one[2:] if one.startswith("##") else f" {one}" for one in pieces]
    elif not any(" " in one for one in tokens):  # nothing says where a word ends
        pieces = [f" {one}" for one in pieces]
        letters = " ?".join(map(re.escape, wanted.replace(" ", "")))
    ends, text = list(accumulate(map(len, pieces))), "".join(pieces)
    spans = [match.span() for match in re.finditer(letters, text) if wanted]
    spans = [(first, last) for first, last in spans if not _is_cut(text, first, last)]
    found = [
        [
            place
            for place, (end, piece) in enumerate(zip(ends, pieces, strict=True))
            if end - len(piece.lstrip()) < last and first < end
        ]
        for first, last in spans
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        read = "".join(tokens).strip()[:80]
        raise LensError(f"the {side} has no word {word!r}; it reads {read!r}")
    raise LensError(
        f"the {side} has {word!r} {len(found)} times, at the positions "
        f"{', '.join(str(places[0]) for places in found)}; give numbers"
    )


def _is_cut(text: str, first: int, last: int) -> bool:
    """Whether a word goes on before or behind this piece of a text, with a letter or a mark on one (as vowels of Hindi)."""
    before, behind = text[:first][-1:], text[last : last + 1]
    letters = [one.isalnum() or one == "_" or _is_mark(one) for one in (before, behind)]
    spaceless = [_SPACELESS.match(one) for one in (before, behind)]
    goes_on = (one and not other for one, other in zip(letters, spaceless, strict=True))
    return any(goes_on) or _is_mark(behind)


def _is_mark(one: str) -> bool:
    return one != "" and unicodedata.category(one).startswith("M")


def _moments(span: np.ndarray, step: float, length: int) -> np.ndarray:
    """The keys that hold a part of the time from a start to an end in seconds; the one at the start, where they are alike.

    Key j stands for `j step` to `(j + 1) step`; the last one also for what its sound has beyond, of less than a key.
    """
    if span.shape != (2,) or not 0 <= span[0] <= span[1] < np.inf:
        raise LensError(f"a label in seconds is (start, end), got {span.tolist()}")
    first, last = span / step + [1e-6, -1e-6]  # 0.3 / 0.1 is 2.9999999999999996
    end = max(int(np.ceil(last)), int(first) + 1)
    return np.arange(int(first), length if end == length + 1 else end)
