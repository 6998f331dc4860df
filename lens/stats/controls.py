"""What was found beside what was drawn at random, and what sets have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_ROUNDING = 1e-12


def p_value(found: float, drawn: ArrayLike) -> float:
    """(1 + draws with as much or more) / (1 + draws): the least that so few draws can show is above 0.

    Reference: Phipson and Smyth 2010, Permutation p-values should never be zero.
    """
    values = np.asarray(drawn, float)
    return float((1 + (values >= found - _ROUNDING).sum()) / (1 + len(values)))


def jaccard(
    sets: Bool[np.ndarray, "sets members"], *, empty: float = 1.0
) -> Float[np.ndarray, "sets sets"]:
    """Jaccard index of each pair of sets, shared / in either; `empty` where neither has a member."""
    members = np.asarray(sets, float)
    shared = members @ members.T
    either = members.sum(1)[:, None] + members.sum(1) - shared
    return np.where(either > 0, shared / np.where(either > 0, either, 1), empty)
