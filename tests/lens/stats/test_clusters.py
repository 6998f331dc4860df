"""The tree, its cuts and the Rand index against naive twins and closed forms; refusals."""

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
    """Groups by always merging the two whose merge adds least to the squared distances within groups."""
    groups = [{member} for member in range(len(distances))]
    heights = []

    def mean(one, other):
        return np.mean([distances[a, b] ** 2 for a in one for b in other])

    def apart(pair):
        one, other = pair
        middles = mean(one, other) - mean(one, one) / 2 - mean(other, other) / 2
        return (2 * len(one) * len(other) / (len(one) + len(other)) * middles) ** 0.5

    while len(groups) > count:
        a, b = min(combinations(groups, 2), key=apart)
        heights.append(apart((a, b)))
        groups = [group for group in groups if group not in (a, b)] + [a | b]
    return {frozenset(group) for group in groups}, heights


def naive_rand(a, b):
    """By pairs of members: the index, above its mean over all orders of the second."""
    pairs = list(combinations(range(len(a)), 2))
    in_a, in_b = ([labels[i] == labels[j] for i, j in pairs] for labels in (a, b))
    both, chance = np.sum(np.logical_and(in_a, in_b)), sum(in_a) * sum(in_b) / len(pairs)
    return (both - chance) / ((sum(in_a) + sum(in_b)) / 2 - chance)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_the_tree_adds_least_to_squared_distances_within_groups(count):
    distances = points(11)
    merges = stats.ward_tree(distances)
    labels = stats.cut_tree(merges, count)
    groups, heights = naive_linkage(distances, count)
    assert {frozenset(np.flatnonzero(labels == label)) for label in set(labels)} == groups
    assert merges[: 11 - count, 2] == pytest.approx(heights)


def test_the_parts_of_a_merge_are_named():
    merges = stats.ward_tree(line(0, 10, 1, 13))
    assert merges[:, :2].tolist() == [[0, 2], [1, 3], [4, 5]]
    assert merges[:, 2] == pytest.approx([1, 3, 11 * 2**0.5])
    above = line(0, 10, 1, 13)[np.triu_indices(4, 1)]
    assert stats.ward_tree(above).tolist() == merges.tolist()


def test_clusters_are_numbered_by_size_and_first_member():
    merges = stats.ward_tree(line(50, 0, 30, 30.1, 0.1, 90, 0.3))
    assert stats.cut_tree(merges, 4).tolist() == [2, 0, 1, 1, 0, 3, 0]
    assert stats.cut_tree(merges, 7).tolist() == list(range(7))
    assert stats.cut_tree(merges, 1).tolist() == [0] * 7


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


def test_labels_are_names_alone():
    """-1, as HDBSCAN calls what is in no group, is one as any other."""
    a, b = np.array([-1, -1, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    assert stats.adjusted_rand(a, b) == stats.adjusted_rand(b, b) == 1
    assert stats.adjusted_rand(np.full(4, -1), np.zeros(4, int)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.ward_tree(np.triu(np.ones((3, 3)), 1)), "distances must be symmetric"),
        (lambda: stats.ward_tree(np.ones((2, 3))), r"must be \[n, n\], got shape \(2, 3\)"),
        (lambda: stats.ward_tree(np.full((3, 3), np.nan)), "3 of 3 distances are not finite"),
        (
            lambda: stats.ward_tree(np.zeros((1, 1))),
            "at least two members and .* got 0 pairs",
        ),
        (lambda: stats.ward_tree(np.ones(4)), "the distance of every pair, got 4 pairs"),
        (
            lambda: stats.cut_tree(np.zeros((2, 3)), 4),
            "count must be 1 to 3, the number of members",
        ),
        (
            lambda: stats.cut_tree(np.zeros((2, 3)), 0),
            "count must be 1 to 3, the number of members",
        ),
        (lambda: stats.adjusted_rand(np.zeros(3, int), np.zeros(4, int)), "got 3 and 4"),
    ],
)
def test_what_cannot_be_grouped_is_refused(call, message):
    with pytest.raises(LensError, match=message):
        call()
