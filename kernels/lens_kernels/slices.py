"""Where the keys of a state lie among those of the whole, and what a slice of keys cannot say.

A slice numbers its keys from its own first one, and `attention` lays its queries along its last one. So
masks and statistics that count positions mean other keys in a slice than in the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_FROM_END = ("causal", "window", "alibi_slopes", "prefix", "blocks", "cu_seqlens")
_FROM_START = ("prefix", "blocks", "cu_seqlens")
_HIDING = ("key_lengths", "key_start", "key_padding", "cu_seqlens", "bias", "allowed")


@dataclass(frozen=True)
class Spans:
    """Spans (first, past the last) of keys among `total`, none of which overlap."""

    total: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Seen:
    """What a call of attention saw: how many keys, by which parts of a mask, and whether sinks were in its rows.

    Attributes:
        keys: of the call.
        parts: names of the mask's parts that were given.
        hides: a part, or a block mask, can hide some keys from every query.
        sinks: learned sinks were given.
    """

    keys: int
    parts: frozenset[str]
    hides: bool
    sinks: bool

    @classmethod
    def of(cls, mask: Mapping[str, Any], keys: int, *, sinks: bool, blocks: bool) -> Seen:
        """The facts of a call, of the parts of its mask by name."""
        known = {*_FROM_END, *_HIDING, "query_lengths"}
        parts = frozenset(
            name for name in known if not (mask.get(name) is None or mask[name] is False)
        )
        return cls(keys, parts, blocks or not parts.isdisjoint(_HIDING), sinks)

    def placed(self, statistics: Set[str], before: int, after: int) -> Spans | None:
        """Where the keys lie; None where hidden keys make that unknown.

        Raises:
            ValueError: the mask or the statistics mean other keys there than in the whole.
        """
        if before or after:
            self._refuse(statistics, before, after)
        elif self.hides:
            return None
        return Spans(before + self.keys + after, ((before, before + self.keys),))

    def _refuse(self, statistics: Set[str], before: int, after: int) -> None:
        parts, counting = self.parts, self.parts.intersection(_FROM_END)
        both = {"key_lengths", "query_lengths"} <= parts
        if after and counting:
            _refuse(counting, f"{after} keys behind it count from its last key")
        if before and (found := parts.intersection(_FROM_START)):
            _refuse(found, f"{before} keys before it count from its first key")
        if both and (counting or "distance" in statistics):
            _refuse(
                {"key_lengths", "query_lengths"}, "other keys beside it count from its last key"
            )
        if before and "key_start" in parts and "moments" in statistics:
            _refuse({"key_start"}, f"{before} keys before it moves where `moments` counts from")


def _refuse(names: Set[str], why: str) -> None:
    raise ValueError(
        f"{', '.join(sorted(names))} of a slice with {why}, and not as in the whole: give the slice its own "
        "part of `allowed` or `bias`, or give attention all the keys and hide some"
    )


def joined(parts: Sequence[Spans | None]) -> Spans | None:
    """The spans of all; None where those of one are not known.

    Raises:
        ValueError: keys that are in two of them, or numbers of keys that differ.
    """
    known = [(number, part) for number, part in enumerate(parts) if part is not None]
    totals = {number: part.total for number, part in known}
    if len(set(totals.values())) > 1:
        raise ValueError(
            "states must be of keys of one whole, but keys_before + keys + keys_after is "
            + ", ".join(f"{total} of state {number}" for number, total in totals.items())
        )
    spans = sorted((span, number) for number, part in known for span in part.spans)
    for (left, one), (right, other) in pairwise(spans):
        if right[0] < left[1]:
            raise ValueError(
                f"states must be of disjoint keys, but keys {right[0]} to {min(left[1], right[1]) - 1} are in "
                f"state {one} and in state {other}, and would count twice"
            )
    if len(known) < len(parts) or not known:
        return None
    return Spans(known[0][1].total, tuple(span for span, _ in spans))


def check_place(names: Set[str], before: int | None, after: int | None) -> None:
    """Refuse a slice that is not placed, or statistics `names` that cannot be moved there.

    Raises:
        TypeError, ValueError: which, and what to do.
    """
    for name, given in (("keys_before", before), ("keys_after", after)):
        if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
            raise TypeError(f"{name} must be a number of keys, got {given!r}")
    if names and (before is None or after is None):
        raise ValueError(
            f"{', '.join(sorted(names))} count positions: say keys_before= and keys_after=, the keys in front "
            "of and behind the slice (0 and 0 where attention got all the keys)"
        )
    if min(before or 0, after or 0) < 0:
        raise ValueError(f"keys_before and keys_after must be 0 or more, got {before} and {after}")
    fixed = ", ".join(sorted(names & {"prefix_mass", "grid_moments"}))
    if fixed and before:
        raise ValueError(
            f"{fixed} of a slice with {before} keys before it are about its own first keys and "
            "cannot be moved: leave them out, or give attention all the keys and hide some"
        )


def moved(
    statistics: Mapping[str, Tensor], lse: Tensor, before: int, after: int
) -> dict[str, Tensor]:
    """`distance` and `moments` of a slice as they are among all the keys; 0 for empty rows."""
    seen = lse > -float("inf")
    found = {}
    if "distance" in statistics:
        found["distance"] = statistics["distance"] + after * seen
    if "moments" in statistics:
        first, second = statistics["moments"].unbind(-1)
        both = (first + before * seen, second + 2 * before * first + before * before * seen)
        found["moments"] = torch.stack(both, -1)
    return found
