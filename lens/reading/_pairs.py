"""Which (query, key) pairs of a prompt are explained: by what their tokens have in common, or as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import check_choice, check_lists
from lens.common.errors import LensError
from lens.reading._head import Head

Kind: TypeAlias = Literal["induction", "duplicate", "previous", "strongest"]
"""The key after an earlier copy of the query's token; an earlier copy; the key before; each row's strongest key."""

Pairs: TypeAlias = Kind | Sequence[Any]
"""A kind, or for each prompt its pairs (query, key)."""

_ROWS = 256


def pairs_of(head: Head, pairs: Pairs, number: int) -> Tensor:
    """[pairs, 2] of one prompt, in the order of their queries; only keys that the query sees.

    Args:
        head: on that prompt.
        pairs: what is asked for.
        number: of the prompt among all.

    Raises:
        LensError: an unknown kind, or places that the prompt has not got or that do not see each other.
    """
    if not isinstance(pairs, str):
        return _given(head, pairs[number])
    kind = check_choice("pairs", pairs, Kind)
    if kind == "strongest":
        found = [head.rows(rows).argmax(-1) for rows in torch.arange(head.tokens).split(_ROWS)]
        return torch.stack([torch.arange(head.tokens), torch.cat(found).cpu()], 1)[1:]
    places = torch.arange(head.tokens)
    if kind == "previous":
        return _seen(head, torch.stack([places[1:], places[:-1]], 1))
    if "input_ids" not in head.inputs:
        raise LensError(
            f"pairs={kind!r} compares tokens and {head.layout.model.name} reads none; give the pairs"
        )
    ids = head.inputs["input_ids"][0].cpu()
    found = []
    for query in range(1, head.tokens):
        copies = (ids[:query] == ids[query]).nonzero()[:, 0] + (kind == "induction")
        copies = copies[copies < query]
        found.append(torch.stack([torch.full_like(copies, query), copies], 1))
    return _seen(head, torch.cat(found)) if found else torch.zeros(0, 2, dtype=torch.long)


def check_pairs(pairs: Pairs, prompts: int) -> None:
    """Raises: LensError: an unknown kind, pairs for another number of prompts, or what is no pair of places."""
    if isinstance(pairs, str):
        check_choice("pairs", pairs, Kind)
        return
    check_lists(pairs=pairs)
    if len(pairs) != prompts:
        raise LensError(
            f"pairs must hold those of each prompt, {prompts} lists of (query, key), got {len(pairs)}"
        )
    for own in pairs:
        _places(own)


def told(pairs: Pairs) -> str:
    """In words."""
    return f"{pairs!r} pairs" if isinstance(pairs, str) else "the given pairs"


def _places(pairs: Any) -> Tensor:
    """[pairs, 2], whole numbers.

    Raises:
        LensError: anything else.
    """
    try:
        found = np.asarray(pairs.cpu() if isinstance(pairs, Tensor) else pairs)
    except ValueError:  # rows of several lengths
        found = np.array(None)
    if found.shape[-1:] == (0,) or found.shape == (0, 2):
        return torch.zeros(0, 2, dtype=torch.long)
    if found.dtype.kind not in "iu" or found.ndim != 2 or found.shape[1] != 2:
        raise LensError(
            f"pairs of a prompt must be a list of (query, key), both whole numbers, got {pairs!r}"
        )
    return torch.from_numpy(found.astype(np.int64))


def _given(head: Head, pairs: Any) -> Tensor:
    found = _places(pairs)
    if len(found) and (int(found.min()) < 0 or int(found.max()) >= head.tokens):
        raise LensError(
            f"places go from 0 to {head.tokens - 1}, got {int(found.min())} to {int(found.max())}"
        )
    seen = _seen(head, found)
    if len(seen) < len(found):
        hidden = next(pair for pair in found.tolist() if pair not in seen.tolist())
        raise LensError(f"query {hidden[0]} does not see key {hidden[1]} in {head.id}")
    return found[found[:, 0].argsort(stable=True)]


def _seen(head: Head, pairs: Tensor) -> Tensor:
    kept = [
        head.call.mask.seen_by(some[:, 0].to(head.key.device), head.tokens)
        .gather(1, some[:, 1:].to(head.key.device))[:, 0]
        .cpu()
        for some in pairs.split(_ROWS)
        if len(some)
    ]
    return pairs[torch.cat(kept)] if kept else pairs
