"""Groups by Ward's method, and how far two groupings agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.stats.intervals import numbers

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real


def ward_tree(
    distances: Real[np.ndarray, "members members"] | Real[np.ndarray, "pairs"],
) -> Float[np.ndarray, "merges 3"]:
    """The tree of agglomerative clustering that keeps groups tight (Ward 1963, J. Am. Stat. Assoc. 58).

    Parts a and b with the middles m_a and m_b merge at the distance sqrt(2 |a| |b| / (|a| + |b|)) |m_a - m_b|, of two single
    members their own.

    Args:
        distances: Euclidean, [n, n], symmetric, or the pairs above its diagonal [n (n - 1) / 2], row by row.

    Returns:
        [n - 1, 3], one row per merge: its two parts, the smaller number first, and this distance, which never
        falls. Part k below n is that member, above it the merge
        `k - n`.

    Raises:
        LensError: fewer than two members, distances that are not square, not symmetric or not finite.

    Example:
        >>> lens.stats.ward_tree(np.array([1.0, 5, 5])).round(2).tolist()
        [[0.0, 1.0, 1.0], [2.0, 3.0, 5.74]]
    """
    from scipy.cluster.hierarchy import linkage

    pairs = numbers(distances)
    if pairs.ndim != 1:
        whole = _square(pairs)
        if not np.allclose(whole, whole.T, equal_nan=True):
            raise LensError(
                "distances must be symmetric: there is one distance of two members; take the mean of both directions"
            )
        pairs = whole[np.triu_indices(len(whole), 1)]
    members = round((1 + np.sqrt(1 + 8 * len(pairs))) / 2)
    if members < 2 or members * (members - 1) // 2 != len(pairs):
        raise LensError(
            f"a tree needs at least two members and the distance of every pair, got {len(pairs)} pairs; "
            "n members have n (n - 1) / 2"
        )
    if not np.isfinite(pairs).all():
        raise LensError(
            f"{int((~np.isfinite(pairs)).sum())} of {len(pairs)} distances are not finite, so nothing "
            "can be grouped by them; leave out the members that have no distance"
        )
    return linkage(pairs, "ward")[:, :3]


def cut_tree(merges: Float[np.ndarray, "merges 3"], count: int) -> Int[np.ndarray, "merges+1"]:
    """[n] labels of `count` clusters, the largest first (of equal ones that with the first member).

    Args:
        merges: of `ward_tree`.
        count: clusters, 1 to n.

    Raises:
        LensError: a count that is not 1 to n.

    Example:
        >>> lens.stats.cut_tree(lens.stats.ward_tree(np.array([1.0, 5, 5])), 2).tolist()
        [0, 0, 1]
    """
    members = len(numbers(merges)) + 1
    if not (is_whole(count) and 1 <= count <= members):
        raise LensError(f"count must be 1 to {members}, the number of members, got {count}")
    part = np.arange(2 * members - 1)  # of each part the cluster that it is in
    for step in range(members - count - 1, -1, -1):  # from the root of each cluster downwards
        part[merges[step, :2].astype(int)] = part[members + step]
    _, first, inside, sizes = np.unique(
        part[:members], return_index=True, return_inverse=True, return_counts=True
    )
    labels = np.empty(count, int)
    labels[np.lexsort((first, -sizes))] = np.arange(count)
    return labels[inside]


def adjusted_rand(a: Int[np.ndarray, "members"], b: Int[np.ndarray, "members"]) -> float:
    """Agreement of two groupings above chance: 1 = the same, 0 = as by chance; it can be below 0.

    1 too where both leave no choice: all together, or each alone.

    Args:
        a, b: [n] labels, whole numbers; -1 is a group as any other.

    Raises:
        LensError: groupings of different or fewer than two members.

    Reference: Hubert and Arabie 1985, J. Classification 2.

    Example:
        >>> lens.stats.adjusted_rand(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
        1.0
    """
    a, b = _members(a), _members(b)
    if len(a) != len(b) or len(a) < 2:
        raise LensError(
            f"two groupings of the same members, at least two, are compared; got {len(a)} and {len(b)}"
        )
    a, b = (np.unique(one, return_inverse=True)[1] for one in (a, b))
    together = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(together, (a, b), 1)
    pairs = _pairs(together).sum()
    of_a, of_b = (_pairs(together.sum(axis)).sum() for axis in (1, 0))
    chance = of_a * of_b / _pairs(len(a))
    most = (of_a + of_b) / 2
    return 1.0 if most == chance else float((pairs - chance) / (most - chance))


def _pairs(members):
    return members * (members - 1) / 2


def _members(grouping: Any) -> np.ndarray:
    found = numbers(grouping)
    if found.ndim != 1 or not np.array_equal(found, np.round(found)):
        raise LensError(f"a grouping is a whole number for each member, got {grouping!r}"[:200])
    return found.astype(int)


def _square(distances: np.ndarray) -> np.ndarray:
    distances = numbers(distances)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise LensError(f"distances must be [n, n], got shape {distances.shape}")
    return distances
