"""The tree, its cuts, silhouettes and the Rand index against naive twins and closed forms; refusals."""

from itertools import combinations

import numpy as np
import pytest

from lens import stats
from lens.common.errors import LensError


def line(*places):
    return np.abs(np.subtract.outer(places, places)).astype(float)


def points(n, seed=5):
    places = np.random.default_rng(seed).normal(size=(n, 3))
    return np.linalg.norm(places[:, None] - places, axis=-1)


def naive_linkage(distances, count):
    """Groups by always merging the two with the smallest mean distance over all pairs of members."""
    groups = [{member} for member in range(len(distances))]
    heights = []

    def apart(pair):
        return np.mean([distances[a, b] for a in pair[0] for b in pair[1]])

    while len(groups) > count:
        a, b = min(combinations(groups, 2), key=apart)
        heights.append(apart((a, b)))
        groups = [group for group in groups if group not in (a, b)] + [a | b]
    return {frozenset(group) for group in groups}, heights


def naive_silhouette(distances, labels):
    scores = []
    for member, label in enumerate(labels):
        inside = [i for i in range(len(labels)) if labels[i] == label and i != member]
        others = set(labels) - {label}
        if not inside or not others:
            scores.append(0.0)
            continue
        a = np.mean([distances[member, i] for i in inside])
        b = min(np.mean(distances[member, labels == other]) for other in others)
        scores.append((b - a) / max(a, b) if max(a, b) else 0.0)
    return np.mean(scores)


def naive_rand(a, b):
    """By pairs of members: the index, above its mean over all orders of the second."""
    pairs = list(combinations(range(len(a)), 2))
    in_a, in_b = ([labels[i] == labels[j] for i, j in pairs] for labels in (a, b))
    both, chance = np.sum(np.logical_and(in_a, in_b)), sum(in_a) * sum(in_b) / len(pairs)
    return (both - chance) / ((sum(in_a) + sum(in_b)) / 2 - chance)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_linkage_is_that_of_means_over_all_pairs(count):
    distances = points(11)
    merges = stats.average_linkage(distances)
    labels = stats.cut_tree(merges, count)
    groups, heights = naive_linkage(distances, count)
    assert {frozenset(np.flatnonzero(labels == label)) for label in set(labels)} == groups
    assert merges[: 11 - count, 2] == pytest.approx(heights)


def test_the_parts_of_a_merge_are_named():
    merges = stats.average_linkage(line(0, 10, 1, 13))
    assert merges.tolist() == [[0, 2, 1], [1, 3, 3], [4, 5, 11]]
    above = line(0, 10, 1, 13)[np.triu_indices(4, 1)]
    assert stats.average_linkage(above).tolist() == merges.tolist()


def test_clusters_are_numbered_by_size_and_first_member():
    merges = stats.average_linkage(line(50, 0, 30, 30.1, 0.1, 90, 0.3))
    assert stats.cut_tree(merges, 4).tolist() == [2, 0, 1, 1, 0, 3, 0]
    assert stats.cut_tree(merges, 7).tolist() == list(range(7))
    assert stats.cut_tree(merges, 1).tolist() == [0] * 7


@pytest.mark.parametrize("n", [2, 3, 19, 37])
def test_silhouettes_of_all_cuts_equal_their_definition(n):
    distances = points(n, seed=n)
    merges = stats.average_linkage(distances)
    expected = [
        naive_silhouette(distances, stats.cut_tree(merges, count)) for count in range(1, n + 1)
    ]
    assert stats.silhouettes(distances, merges) == pytest.approx(np.array(expected), abs=1e-12)


def test_silhouettes_in_closed_form():
    distances = line(0, 1, 5, 6)
    # a = 1 for all; b = 5.5 at the ends, 4.5 inside
    expected = (2 * (4.5 / 5.5) + 2 * (3.5 / 4.5)) / 4
    found = stats.silhouettes(distances, stats.average_linkage(distances))
    assert found[1] == pytest.approx(expected)
    assert found[[0, 3]].tolist() == [0, 0]
    equal = np.zeros((5, 5))
    assert stats.silhouettes(equal, stats.average_linkage(equal)).tolist() == [0] * 5


def test_the_rand_index_in_closed_form():
    a = np.array([0, 0, 1, 1])
    assert stats.adjusted_rand(a, np.array([1, 1, 0, 0])) == 1
    assert stats.adjusted_rand(a, np.array([0, 1, 0, 1])) == pytest.approx(-0.5)
    assert stats.adjusted_rand(np.zeros(4, int), np.zeros(4, int)) == 1
    assert stats.adjusted_rand(np.arange(4), np.arange(4)[::-1]) == 1


def test_the_rand_index_equals_that_of_pairs_and_is_0_by_chance():
    random = np.random.default_rng(0)
    found = []
    for _ in range(400):
        a, b = random.integers(3, size=23), random.integers(4, size=23)
        found.append(stats.adjusted_rand(a, b))
        assert found[-1] == pytest.approx(naive_rand(a, b))
    assert abs(np.mean(found)) < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.average_linkage(np.ones((2, 3))), r"must be \[n, n\], got shape \(2, 3\)"),
        (lambda: stats.average_linkage(np.full((3, 3), np.nan)), "3 of 3 distances are not finite"),
        (
            lambda: stats.average_linkage(np.zeros((1, 1))),
            "at least two members and .* got 0 pairs",
        ),
        (lambda: stats.average_linkage(np.ones(4)), "the distance of every pair, got 4 pairs"),
        (
            lambda: stats.cut_tree(np.zeros((2, 3)), 4),
            "count must be 1 to 3, the number of members",
        ),
        (
            lambda: stats.cut_tree(np.zeros((2, 3)), 0),
            "count must be 1 to 3, the number of members",
        ),
        (lambda: stats.silhouettes(np.ones((3, 3)), np.zeros((3, 3))), "has 2 merges, got 3"),
        (lambda: stats.adjusted_rand(np.zeros(3, int), np.zeros(4, int)), "got 3 and 4"),
    ],
)
def test_what_cannot_be_grouped_is_refused(call, message):
    with pytest.raises(LensError, match=message):
        call()
