"""Which token stands at each cached key, whatever was done to the cache between two passes.

Beam search puts the rows of a cache in another order, assisted decoding cuts drafts off, windows drop old
keys. Nobody says so to an attention layer. But cached keys keep their bits: a row is the continuation of
the earlier row that has the same keys. A few numbers of every key are kept for that. Where no earlier row
fits (a cache from elsewhere, a quantised one), the tokens are not known, and nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens.passes.calls import LayerCall

_NUMBERS = 4  # of the first key head


@dataclass(frozen=True)
class _Past:
    start: int  # position of the first kept key
    keys: Tensor  # [rows, keys, numbers]
    tokens: Tensor  # [rows, start + keys]


class History:
    """The tokens of every layer's keys, pass by pass."""

    def __init__(self) -> None:
        self._pasts: dict[tuple[str, int, int], _Past] = {}

    def tokens(self, call: LayerCall, new: Tensor | None) -> Tensor | None:
        """[rows, tokens]: all tokens up to the last key of a call, `new` being those of its queries."""
        start, keys = call.mask.start, call.key.shape[2]
        cached = keys - call.query.shape[2]
        marks = call.key[:, 0, :, :_NUMBERS].detach().clone()
        past = self._pasts.pop((call.place, call.layer, call.part), None)
        if new is None or new.shape != (len(marks), call.query.shape[2]):
            return None
        tokens = new.to(marks.device)
        if start + cached:
            rows = None if past is None else _rows(past, marks[:, :cached], start)
            if past is None or rows is None:
                return None
            tokens = torch.cat([past.tokens[rows, : start + cached], tokens], 1)
        self._pasts[call.place, call.layer, call.part] = _Past(start, marks, tokens)
        return tokens


def _rows(past: _Past, marks: Tensor, start: int) -> Tensor | None:
    """[rows]: which earlier row each row goes on from, by its cached keys; None if there is none.

    A row that stayed in its place is preferred. Rows that see the same keys have the same tokens there; what
    was before may differ, so that rows which could go on from several are given none.
    """
    first, count = start - past.start, marks.shape[1]
    before = past.keys[:, first : first + count]
    if first < 0 or not count or before.shape[1] != count:
        return None
    if before.shape == marks.shape and torch.equal(before, marks):
        return torch.arange(len(marks), device=marks.device)
    same = (marks[:, None] == before[None]).flatten(2).all(-1)  # [rows, earlier rows]
    if not bool(same.any(1).all()):
        return None
    rows = same.int().argmax(1)
    tokens = past.tokens[:, : start + count]
    agree = (tokens[None] == tokens[rows][:, None]).all(-1) | ~same
    return rows if bool(agree.all()) else None
