"""Orders: ranks, what is at the top, and how far two orders agree.

`kendall` and `top_overlap` take several measures at once and give a matrix, as `np.corrcoef` does.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lens.common.choices import check_counts, is_whole
from lens.common.errors import LensError
from lens.stats.intervals import LEVEL, numbers

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def ranks(values: ArrayLike) -> Float[np.ndarray, "*rest n"]:
    """[..., n] rank along the last axis, the smallest 1, ties at their mean rank; NaN where one is.

    Example:
        >>> lens.stats.ranks([30, 10, 10]).tolist()
        [3.0, 1.5, 1.5]
    """
    from scipy.stats import rankdata

    return rankdata(numbers(values), axis=-1)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's correlation of two vectors [n]: Pearson's of the ranks, ties at their mean rank.

    Entries that are not finite in either are left out; NaN where fewer than two are left or one side
    is constant.

    Raises:
        LensError: vectors of two lengths.

    Example:
        >>> lens.stats.spearman([1, 2, 3], [10, 20, 400])
        1.0
    """
    x, y = numbers(a), numbers(b)
    if x.shape != y.shape or x.ndim != 1:
        raise LensError(
            f"expected two vectors of one length, got shapes {x.shape} and {y.shape}; give one number "
            "per head to both"
        )
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return float("nan")
    left, right = (one - one.mean() for one in ranks(np.stack([x[both], y[both]])))
    norm = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / norm) if norm else float("nan")


def spearman_by_chance(items: int) -> float:
    """The size that Spearman's correlation of two orders drawn at random exceeds in 5 of 100 draws.

    Args:
        items: that are put in order, at least 2. The normal approximation, at most 1.

    Example:
        >>> from lens.stats.orders import spearman_by_chance
        >>> [round(spearman_by_chance(count), 2) for count in (3, 6, 270)]
        [1.0, 0.88, 0.12]
    """
    check_counts(2, items=items)
    return min(1.0, NormalDist().inv_cdf((1 + LEVEL) / 2) / (items - 1) ** 0.5)


def random_orders(items: int) -> str:
    """What `spearman_by_chance` says, in words; empty where so few items (up to 4) leave no size out.

    Example:
        >>> from lens.stats.orders import random_orders
        >>> random_orders(270)
        '95 of 100 orders at random: within ±0.12'
    """
    bound = spearman_by_chance(items) if items > 1 else 1.0
    return f"{100 * LEVEL:.0f} of 100 orders at random: within ±{bound:.2f}" if bound < 1 else ""


def kendall(values: ArrayLike) -> Float[np.ndarray, "*rest measures measures"]:
    """Kendall's tau-b between all pairs of measures.

        tau = (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b))

    Args:
        values: [..., measures, n], of each measure one number per head.

    Returns:
        [..., measures, measures]; NaN where a measure is constant or has a NaN: no order to compare.

    Raises:
        LensError: fewer than two dimensions.

    Exact. Pairs of heads are compared once per measure, as bits: 66 pairs of measures cost about as much
    as 12 measures.

    Reference: Kendall 1945, The treatment of ties in ranking problems.

    Example:
        >>> lens.stats.kendall([[1, 2, 3, 4], [1, 2, 4, 3]]).round(2).tolist()
        [[1.0, 0.67], [0.67, 1.0]]
    """
    array = _measures(values)
    flat = array.reshape(-1, *array.shape[-2:])
    found = np.stack([_kendall(one) for one in flat]) if len(flat) else np.empty(array.shape[:-1])
    return found.reshape(*array.shape[:-1], array.shape[-2])


def top(values: ArrayLike, k: int) -> Int[np.ndarray, "*rest {k}"]:
    """[..., k] places of the k largest along the last axis, the largest first; ties by place.

    NaN comes after every number.

    Raises:
        LensError: a k that is not 0 to n.

    Example:
        >>> lens.stats.top([3, 9, 5], 2).tolist()
        [1, 2]
    """
    array = numbers(values)
    if not is_whole(k) or not 0 <= k <= array.shape[-1]:
        raise LensError(f"k must be 0 to {array.shape[-1]}, the number of values, got {k!r}")
    return np.argsort(-array, axis=-1, kind="stable")[..., :k]


def top_overlap(values: ArrayLike, k: int) -> Float[np.ndarray, "*rest measures measures"]:
    """Share of the k largest of one measure that are among the k largest of another one.

    Args:
        values: [..., measures, n].
        k: how many are at the top, 1 to n; ties by place.

    Returns:
        [..., measures, measures], 1 on the diagonal; by chance k / n. NaN where fewer than k of a measure are known.

    Raises:
        LensError: fewer than two dimensions, or a k that is not 1 to n.

    Example:
        >>> lens.stats.top_overlap([[3, 9, 5], [9, 3, 5]], 2).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    array = _measures(values)
    if not is_whole(k) or not 1 <= k <= array.shape[-1]:
        raise LensError(f"k must be 1 to {array.shape[-1]}, the number of values, got {k!r}")
    inside = np.zeros(array.shape)
    np.put_along_axis(inside, top(array, k), 1, axis=-1)
    inside[(~np.isnan(array)).sum(-1) < k] = np.nan
    return inside @ np.swapaxes(inside, -1, -2) / k


def _measures(values: ArrayLike) -> np.ndarray:
    array = numbers(values)
    if array.ndim < 2:
        raise LensError(
            f"expected measures [..., measures, n], got shape {array.shape}; stack them: "
            "np.stack([a, b])"
        )
    return array


def _kendall(values: np.ndarray) -> np.ndarray:
    """Tau-b [measures, measures] of measures [measures, n]."""
    from scipy.stats import rankdata

    whole = np.where(np.isnan(values).any(1, keepdims=True), 0, values)  # a NaN: no order
    size = np.int16 if values.shape[1] < 1 << 15 else np.int32
    orders = rankdata(whole, method="dense", axis=1).astype(size)
    untied, rises = (np.stack(bits) for bits in zip(*map(_pairs, orders), strict=True))
    agree = np.empty((len(orders), len(orders)))
    for i in range(len(orders)):
        both = untied[i] & untied[i:]
        opposed = (rises[i] ^ rises[i:]) & both
        agree[i, i:] = agree[i:, i] = _count(both) - 2 * _count(opposed)
    untied_pairs = agree.diagonal()
    norm = np.sqrt(np.outer(untied_pairs, untied_pairs))
    return np.where(norm > 0, agree / np.where(norm > 0, norm, 1), np.nan)


def _pairs(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As bits, of each pair of members once: whether they differ, and whether the second is larger.

    In a ring, the pairs are every member with those up to half a round ahead. Of an even ring, the
    farthest ones meet twice: their second half goes.
    """
    n = len(order)
    ahead = np.lib.stride_tricks.sliding_window_view(np.r_[order, order], n)[1 : n // 2 + 1]
    pairs = n * (n - 1) // 2
    return _bits((ahead != order).ravel()[:pairs]), _bits((ahead > order).ravel()[:pairs])


def _bits(flags: np.ndarray) -> np.ndarray:
    """Flags as words of 64 bits, filled up with zeros."""
    packed = np.packbits(flags)
    return np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)


def _count(bits: np.ndarray) -> np.ndarray:
    """Bits that are set in each row."""
    return np.bitwise_count(bits).sum(1, dtype=np.int64)
