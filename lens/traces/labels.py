"""A user's own labels of tokens: from what `lens.capture` is given to numbers, one per position.

A head's mass on keys whose label is the query's own is exact at any length (`match_mass`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from lens.common.errors import LensError
from lens.traces.metrics import METRICS

MATCH_RULES = ("current_token_position", "previous_token", "same_token", "induction")
"""The rules of `match_mass` that every trace has; a trace's own labels come after them."""
PREFIX = 4
"""First keys whose mass a trace keeps as `prefix_mass`."""
NONE = -1
"""The number of a position that matches nothing."""
_ENDINGS = ("_low", "_high", "_uniform", "_random_weights", "_sink_excluded")
_TAKEN = ("layer", "head", "name", "prompts", "top_key_token", *MATCH_RULES, *METRICS)


@dataclass(frozen=True)
class Labels:
    """What each position is as a query and as a key, by one name.

    Attributes:
        name: of the rule and of its score.
        query, key: [positions] int64; -1 matches nothing.
    """

    name: str
    query: np.ndarray
    key: np.ndarray

    def check(self, length: int) -> None:
        """Raises LensError unless there is one label per position."""
        if len(self.query) != length or len(self.key) != length:
            raise LensError(
                f"labels[{self.name!r}] must have one label for each of {length} positions, got "
                f"{len(self.query)} query labels and {len(self.key)} key labels"
            )


def read_labels(given: Any, tokens: Sequence[Sequence[str] | None]) -> list[tuple[Labels, ...]]:
    """The labels of every prompt.

    Args:
        given: None, or name -> (query labels, key labels) or a function of a prompt's tokens that
            returns this pair. Either is one label per token, for all prompts or a list for each; a
            label is an integer or a text, and None and negative numbers match nothing.
        tokens: of each prompt; None where it has none (a picture).

    Raises:
        LensError: no mapping, a name that is taken, or labels that are not one per token.
    """
    if given is None:
        return [() for _ in tokens]
    if not isinstance(given, Mapping) or not given:
        raise LensError(
            "labels must be a mapping such as {'atoms': (query_labels, key_labels)}, got "
            + ("an empty one" if isinstance(given, Mapping) else type(given).__name__)
        )
    for name in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise LensError(f"a name of labels must be a word such as 'atoms', got {name!r}")
        if name in _TAKEN or name.endswith(_ENDINGS):
            raise LensError(f"the name {name!r} is taken by a score; call these labels otherwise")
    return [
        tuple(_labels(name, one, at, tokens) for name, one in given.items())
        for at in range(len(tokens))
    ]


def _labels(name: str, given: Any, at: int, prompts: Sequence[Sequence[str] | None]) -> Labels:
    """Of one name and one prompt."""
    where, tokens = f"labels[{name!r}]", prompts[at]
    if callable(given):
        if tokens is None:
            raise LensError(f"{where} is a function of tokens, and a picture has none")
        pair = given(list(tokens))
    else:
        pair = given
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise LensError(f"{where} must be a pair (query labels, key labels), got {pair!r:.60}")
    known: dict[Any, int] = {}
    sides = []
    for side, what in zip(pair, ("query", "key"), strict=True):
        side = side.tolist() if hasattr(side, "tolist") else side
        if isinstance(side, str) or not isinstance(side, Sequence):
            raise LensError(f"{where}: {what} labels must be a list, got {side!r:.60}")
        if len(side) and isinstance(side[0], Sequence) and not isinstance(side[0], str):
            if len(side) != len(prompts):
                raise LensError(
                    f"{where}: {what} labels are {len(side)} lists for {len(prompts)} prompts"
                )
            side = side[at]
        numbers = [_number(label, known, where) for label in side]
        sides.append(np.array(numbers, dtype=np.int64))
    found = Labels(name, *sides)
    if tokens is not None:
        found.check(len(tokens))
    return found


def _number(label: Any, known: dict[Any, int], where: str) -> int:
    if label is None or (isinstance(label, Integral) and label < 0):
        return NONE
    if isinstance(label, Integral | str):
        return known.setdefault(label, len(known))
    raise LensError(f"{where}: a label must be an integer, a text or None, got {label!r:.60}")
