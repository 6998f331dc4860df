"""Groups of members by how far apart they are: Ward's tree, a count that is stable and separated, and whether there are groups.

The tree is Ward's (1963): what merges is what adds least to the squared distances within groups. (Average linkage takes a
few members that stand out for groups of their own, and all others for one.) Of every count two things are asked: do its groups
come back on 80 % of the members (adjusted Rand index), and are they separated (mean silhouette of the members, with respect to
groups that hold at least 5 % of them: a straggler is no group, counts 0 and separates nobody).

Any cloud can be cut, and into some counts better than into others. So the product of the two stands beside that of single clouds,
normal and as long in each direction as the members are (the null of Liu et al. 2008, J. Am. Stat. Assoc. 103, "SigClust"), cut in
the same way: the count is the one that exceeds the mean of all of these, its own with them, by most of their standard deviations
(as the gap statistic of Tibshirani et al. 2001 takes it), and there are groups where that is more than any of the clouds has at
its own best count: of members that are such a cloud themselves once in 21 times. A skewed cloud is no normal one and may stand above them: what is told is that the members are not one normal cloud, and where they come apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lens.common.choices import check_counts
from lens.stats.clusters import adjusted_rand, cut_tree, ward_tree

MOST = 12  # groups that are tried, where no count is asked for
KEPT = 0.8  # share of the members that are grouped again
CLOUDS = 20
_FEW_DRAWS = 8  # of 80 % of a cloud's members
_MOST_MEMBERS = 400  # that are put beside clouds
_FINEST = 1e-3  # standard deviation of clouds, below which nothing is told by it
_LEAST = 0.05  # share of the members that a group holds


@dataclass(frozen=True, eq=False)
class Groups:
    """Members in groups.

    Attributes:
        labels: [members], number of the group, the largest first.
        merges: [members - 1, 3], the tree.
        silhouette: of the groups, as this module has it.
        rand: [draws] adjusted Rand index of the groups of 80 % of the members with these: 1 the same, 0 by chance. The
            count is chosen by its mean times the silhouette, so that both flatter a little.
        best: by how many standard deviations of these members and single clouds together the product of the two exceeds their
            mean (of at most 400 members, drawn; at most 4.5); clouds: the same of each of 20 of them, at the count where it exceeds most.
    """

    labels: np.ndarray = field(repr=False)
    merges: np.ndarray = field(repr=False)
    silhouette: float
    rand: np.ndarray = field(repr=False)
    best: float
    clouds: np.ndarray = field(repr=False)

    @property
    def count(self) -> int:
        """Of the groups."""
        return int(self.labels.max()) + 1

    @property
    def apart(self) -> bool:
        """Whether the members are more clearly in groups than each of the clouds is."""
        return self.best > float(self.clouds.max())

    @property
    def in_words(self) -> str:
        """How stable and separated they are, and what that is beside a single cloud."""
        beside = "above" if self.apart else "not above"
        return (
            f"adjusted Rand {self.rand.mean():.2f} on {KEPT:.0%} of them, silhouette {self.silhouette:.2f}; together "
            f"{self.best:.1f} standard deviations over the mean of these and of single normal clouds, {beside} the {self.clouds.max():.1f} that one of {CLOUDS} has"
        )


def grouped(
    distances: np.ndarray, *, count: int | None = None, draws: int = 20, seed: int = 0
) -> Groups:
    """Members in groups, as this module says.

    Args:
        distances: [members, members] Euclidean, at least 3 members.
        count: of the groups; None: of 2 to 12 (and at most half as many as members) as above.
        draws: of 80 % of the members.
        seed: of the draws.

    Raises:
        LensError: distances of which there is no tree.

    Example:
        >>> from lens.stats.grouping import grouped
        >>> places = np.concatenate([np.random.default_rng(0).normal(at, 0.1, 9) for at in (0, 1, 5)])
        >>> found = grouped(abs(np.subtract.outer(places, places)))
        >>> (found.count, found.apart)
        (3, True)
    """
    check_counts(draws=draws)
    check_counts(0, seed=seed)
    merges = ward_tree(distances)
    members = len(distances)
    tried = list(range(2, max(3, min(MOST, members // 2) + 1))) if count is None else [count]
    random = np.random.default_rng(seed)
    some = np.sort(random.permutation(members)[: max(_MOST_MEMBERS, count or 0)])
    fewer = distances[np.ix_(some, some)]
    sides = _sides(fewer)
    places = (random.normal(size=(len(some), len(sides))) * sides for _ in range(CLOUDS))
    products = np.array([_product(_between(cloud), tried, random) for cloud in places])
    both = np.vstack([_product(fewer, tried, random), products])
    over = (both - both.mean(0)) / np.maximum(both.std(0), _FINEST)
    count = tried[int(over[0].argmax())]
    rand, apart = _scores(distances, merges, [count], draws, random)
    return Groups(
        labels=cut_tree(merges, count),
        merges=merges,
        silhouette=float(apart[0]),
        rand=rand[:, 0],
        best=float(over[0].max()),
        clouds=over[1:].max(1),
    )


def _scores(
    distances: np.ndarray,
    merges: np.ndarray,
    tried: list[int],
    draws: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """[draws, counts] adjusted Rand index of the groups of 80 % of the members with those of all; [counts] silhouettes."""
    members = len(distances)
    kept = max(tried[-1], round(KEPT * members), 2)
    whole = [cut_tree(merges, groups) for groups in tried]
    rand = np.empty((draws, len(tried)))
    for row in rand:
        some = np.sort(random.permutation(members)[:kept])
        again = ward_tree(distances[np.ix_(some, some)])
        for place, groups in enumerate(tried):
            own = np.unique(whole[place][some], return_inverse=True)[1]
            row[place] = adjusted_rand(own, cut_tree(again, groups))
    return rand, np.array([_silhouette(distances, labels) for labels in whole])


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean over members, of which those in groups below the least size count 0 and are no neighbours."""
    sizes = np.bincount(labels)
    large = np.flatnonzero(sizes >= max(2, _LEAST * len(labels)))
    if len(large) < 2:
        return 0.0
    inside = labels[:, None] == large
    sums = distances @ inside
    own = inside.any(1)
    a = (sums * inside).sum(1)[own] / (sizes[labels[own]] - 1)
    b = np.where(inside, np.inf, sums / sizes[large])[own].min(1)
    widest = np.maximum(a, b)
    return float(((b - a) / np.where(widest > 0, widest, 1)).sum() / len(labels))


def _product(distances: np.ndarray, tried: list[int], random: np.random.Generator) -> np.ndarray:
    """[counts] of stability and separation."""
    rand, apart = _scores(distances, ward_tree(distances), tried, _FEW_DRAWS, random)
    return rand.mean(0) * apart


def _sides(distances: np.ndarray) -> np.ndarray:
    """[directions] standard deviation of the members along each: classical scaling (Torgerson 1952)."""
    squares = np.square(distances)
    middle = squares.mean(0)
    inner = -0.5 * (squares - middle - middle[:, None] + middle.mean())
    lengths = np.linalg.eigvalsh(inner) / len(distances)
    most = lengths.max()
    return np.sqrt(lengths[lengths > 1e-9 * most]) if most > 0 else np.zeros(1)


def _between(places: np.ndarray) -> np.ndarray:
    """[members, members] distances."""
    squares = np.square(places).sum(-1)
    found = squares[:, None] + squares - 2 * places @ places.T
    np.fill_diagonal(found, 0)
    return np.sqrt(np.maximum(found, 0))
