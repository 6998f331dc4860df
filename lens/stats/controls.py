"""What was found beside what was drawn at random, and what sets have in common."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_ROUNDING = 1e-12


def drawing(seed: int, *names: int | str) -> np.random.Generator:
    """Draws for one thing alone, such as a head on a prompt: the same, whatever else is asked for beside it.

    Args:
        seed: of all draws.
        names: of the thing: numbers of at least 0, or words, such as a prompt's digest.
    """
    words = [zlib.crc32(name.encode()) if isinstance(name, str) else int(name) for name in names]
    return np.random.default_rng([len(words), seed, *words])  # zeros at the end change nothing


def p_value(found: float, drawn: ArrayLike) -> float:
    """(1 + draws with as much or more) / (1 + draws): the least that so few draws can show is above 0.

    Draws that are NaN do not count; NaN where what was found is.

    Reference: Phipson and Smyth 2010, Permutation p-values should never be zero.
    """
    if np.isnan(found):
        return float("nan")
    values = np.asarray(drawn, float)
    values = values[~np.isnan(values)]
    return float((1 + (values >= found - _ROUNDING).sum()) / (1 + len(values)))


def others(
    chosen: Bool[np.ndarray, "groups members"],
    random: np.random.Generator,
    free: Bool[np.ndarray, "groups members"] | None = None,
    *,
    within: bool = False,
) -> Bool[np.ndarray, "groups members"]:
    """As many members that were not chosen, drawn at random; where fewer are left, those.

    Args:
        chosen: which members are, such as heads [layers, heads].
        random: draws them.
        free: those that may be drawn; None: all that were not chosen.
        within: from each group as many as were chosen there, instead of from all alike.
    """
    found, free = np.zeros_like(chosen), ~chosen if free is None else free
    if not within:
        found.flat[random.permutation(np.flatnonzero(free))[: chosen.sum()]] = True
        return found
    for group in np.flatnonzero(chosen.any(1)):
        left = random.permutation(np.flatnonzero(free[group]))
        found[group, left[: chosen[group].sum()]] = True
    return found


def jaccard(
    sets: Bool[np.ndarray, "sets members"], *, empty: float = 1.0
) -> Float[np.ndarray, "sets sets"]:
    """Jaccard index of each pair of sets, shared / in either; `empty` where neither has a member."""
    members = np.asarray(sets, float)
    shared = members @ members.T
    either = members.sum(1)[:, None] + members.sum(1) - shared
    return np.where(either > 0, shared / np.where(either > 0, either, 1), empty)


def jaccard_by_chance(
    shares: Float[np.ndarray, "sets"],
) -> Float[np.ndarray, "sets sets"]:
    """Jaccard index expected of each pair of sets drawn at random, of their shares of all members: ab / (a + b - ab).

    Expected shared over expected union, near the mean of drawn ones; 1 where both are empty.

    Example:
        >>> from lens.stats.controls import jaccard_by_chance
        >>> round(float(jaccard_by_chance(np.array([0.5, 0.5]))[0, 1]), 3)
        0.333
    """
    both = shares[:, None] * shares
    either = shares[:, None] + shares - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), 1.0)
