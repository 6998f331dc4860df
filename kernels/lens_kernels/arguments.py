"""Arguments of another kind than asked for, refused by name and in one line, whichever function was given them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def check_tensors(**given: Any) -> None:
    """Raises TypeError: one that is neither a tensor nor None."""
    from torch import Tensor

    for name, one in given.items():
        if one is not None and not isinstance(one, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(one).__name__}")


def check_kinds(kind: type | tuple[type, ...], **given: Any) -> None:
    """Raises TypeError: one that is neither of this kind nor None."""
    for name, one in given.items():
        if one is not None and not isinstance(one, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            said = " or ".join(each.__name__ for each in kinds)
            raise TypeError(f"{name} must be of type {said}, got {type(one).__name__}")


def check_names(name: str, given: Any) -> frozenset[str]:
    """One word or several; raises TypeError where they are none."""
    found = (
        [given] if isinstance(given, str) else [*given] if isinstance(given, Iterable) else [None]
    )
    names = [one for one in found if isinstance(one, str)]
    if len(names) == len(found):
        return frozenset(names)
    raise TypeError(f"{name} must be a list of names, got {type(given).__name__}")


def as_number(name: str, given: Any) -> float:
    """As a float, infinite where it is larger than all; raises TypeError where it is no number."""
    if not hasattr(given, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(given).__name__}")
    try:
        return float(given)
    except OverflowError:
        return math.inf if given > 0 else -math.inf
