"""Checks labels and groups of positions, once for tensors that are given again, as at every layer of a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int

    QueryLabels = Int[Tensor, "queries"] | Int[Tensor, "batch queries"]
    KeyLabels = Int[Tensor, "keys"] | Int[Tensor, "batch keys"]
    LabelPairs = Sequence[tuple[QueryLabels, KeyLabels]]

MAX_GROUPS = 4
Made = TypeVar("Made")

_LARGEST = 1 << 20
"""Numbers of the tensors of one entry."""
_entries: deque[tuple[tuple[object, ...], Sequence[Tensor], Sequence[Tensor], object]] = deque(
    maxlen=8
)
"""What it was made of, the tensors (so that no other takes their place in memory), and what was made."""


def read_labels(
    match: LabelPairs | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Stacked label vectors [batch, queries | keys, pairs], int32."""
    if match is None:
        return None, None
    if not isinstance(match, Sequence) or isinstance(match, str):
        raise TypeError(f"match must be a list of pairs of labels, got {match!r}"[:200])
    if not len(match):
        raise ValueError("match is empty; give at least one (query_labels, key_labels) or None")
    pairs = [pair for pair in match if isinstance(pair, tuple | list)]
    tensors = [labels for pair in pairs for labels in pair]
    if len(pairs) < len(match) or not all(isinstance(labels, Tensor) for labels in tensors):
        return _stacked(match, query, key)
    lengths = tuple(len(pair) for pair in pairs)
    also = ("labels", lengths, query.shape[0], query.shape[2], key.shape[2], query.device)
    return _made_of(tensors, also, lambda: _stacked(match, query, key))


def _stacked(match: LabelPairs, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Raises TypeError, ValueError: labels of another kind or shape."""
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, pair in enumerate(match):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"match[{number}] must be a pair (query_labels, key_labels), got "
                f"{type(pair).__name__}"
            )
        sides = (("query", query.shape[2]), ("key", key.shape[2]))
        for (side, count), labels, column in zip(sides, pair, columns, strict=True):
            name = f"{side} labels of match[{number}]"
            column.append(_label_vector(name, labels, query, count))
    query_labels, key_labels = (
        _packed(side, column) for side, column in zip(("query", "key"), columns, strict=True)
    )
    return query_labels, key_labels


def _label_vector(name: str, labels: Tensor, query: Tensor, count: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an integer tensor, got {kind}")
    if labels.device != query.device:
        raise ValueError(f"{name} are on {labels.device}, the query on {query.device}; move them")
    batch = query.shape[0]
    if tuple(labels.shape) not in ((count,), (batch, count)):
        raise ValueError(
            f"{name} must be [{count}] or [batch, ...] = [{batch}, {count}], got "
            f"{list(labels.shape)}"
        )
    labels = labels if labels.dtype.is_signed else labels.to(torch.int64)
    return labels.expand(batch, count)


def _packed(side: str, columns: list[Tensor]) -> Tensor:
    """[batch, positions, pairs] int32 with the pairs outermost in memory, -1 for labels that never match."""
    labels, most = torch.stack(columns), torch.iinfo(torch.int32).max
    if labels.dtype != torch.int64:
        return labels.clamp(min=-1).to(torch.int32).movedim(0, -1)
    low, high = torch.stack(labels.aminmax()).tolist()
    if high > most:
        number = int((labels > most).flatten(1).any(1).int().argmax())
        raise ValueError(
            f"{side} labels of match[{number}] must fit 32 bits (below {most + 1}); number the distinct "
            "labels with torch.unique(labels, return_inverse=True)"
        )
    labels = labels if low >= -1 else labels.clamp(min=-1)
    return labels.to(torch.int32).movedim(0, -1)


def read_groups(
    groups: Tensor | None, batch: int, keys: int, device: torch.device
) -> tuple[Tensor | None, int]:
    if groups is None:
        return None, 0
    also = ("groups", batch, keys, device)
    return _made_of([groups], also, lambda: _counted(groups, batch, keys, device))


def _counted(groups: Tensor, batch: int, keys: int, device: torch.device) -> tuple[Tensor, int]:
    """Raises TypeError, ValueError: groups of another kind, shape or number."""
    if groups.is_floating_point() or groups.dtype == torch.bool:
        raise TypeError(f"groups must hold integers 0..{MAX_GROUPS - 1}, got {groups.dtype}")
    if tuple(groups.shape) != (batch, keys):
        raise ValueError(
            f"groups must be [batch, keys] = [{batch}, {keys}], got {list(groups.shape)}"
        )
    if groups.device != device:
        raise ValueError(f"groups is on {groups.device}, the query on {device}; move it there")
    smallest, largest = (int(bound) for bound in groups.aminmax())
    if smallest < 0 or largest >= MAX_GROUPS:
        raise ValueError(
            f"groups must lie in 0..{MAX_GROUPS - 1} (at most {MAX_GROUPS} groups), got "
            f"{smallest}..{largest}; join groups or call attention more than once"
        )
    return groups.to(torch.int32).contiguous(), largest + 1


def _made_of(tensors: Sequence[Tensor], also: tuple[object, ...], make: Callable[[], Made]) -> Made:
    """What `make()` gave for these very tensors, unchanged since, and equal `also`; else `make()`."""
    if any(one.is_inference() for one in tensors):  # they do not count their changes
        return make()
    key = (*also, *((id(one), one._version) for one in tensors))
    for known, own, copies, made in tuple(_entries):
        if known == key and all(map(_unchanged, own, copies)):
            return made  # type: ignore[return-value]  # the key names who made it
    made = make()
    if sum(one.numel() for one in tensors) <= _LARGEST:
        copies = [one.clone() if one.device.type == "cpu" else one for one in tensors]
        _entries.append((key, tuple(tensors), copies, made))
    return made


def _unchanged(own: Tensor, copy: Tensor) -> bool:
    """On the CPU numpy writes without torch's count; a device is not waited for."""
    return own.device.type != "cpu" or torch.equal(own, copy)
