"""Groups where there are some, stragglers and single clouds told apart; silhouettes beside loops."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from lens import stats
from lens.stats.grouping import KEPT, _between, _sides, _silhouette, grouped


def clouds(seed, *sizes, apart=6.0, width=5):
    """Distances of normal clouds in directions of their own, and which cloud each member is of."""
    random = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(len(sizes)), sizes)
    places = random.normal(size=(len(kinds), width))
    places[np.arange(len(kinds)), kinds] += apart * (kinds > 0)
    return cdist(places, places), kinds


def naive_silhouette(distances, labels, least):
    large = [label for label in set(labels) if (labels == label).sum() >= least]
    scores = [0.0] * len(labels)
    for member, label in enumerate(labels):
        if label not in large or len(large) < 2:
            continue
        inside = [i for i in range(len(labels)) if labels[i] == label and i != member]
        a = np.mean([distances[member, i] for i in inside])
        b = min(np.mean(distances[member, labels == other]) for other in large if other != label)
        scores[member] = (b - a) / max(a, b)
    return np.mean(scores)


def test_silhouettes_equal_their_definition_without_stragglers():
    distances, _ = clouds(0, 12, 9, 9)
    random = np.random.default_rng(1)
    for labels in (random.integers(3, size=30), np.repeat([0, 1, 2], [15, 14, 1])):
        assert _silhouette(distances, labels) == pytest.approx(
            naive_silhouette(distances, labels, 2)
        )
    # 5 % of 30 members are 2: one group and a straggler are no groups
    assert _silhouette(distances, np.repeat([0, 1], [29, 1])) == 0


def test_groups_come_back_and_are_told_apart():
    distances, kinds = clouds(2, 20, 20, 14)
    found = grouped(distances)
    assert found.count == 3
    assert stats.adjusted_rand(found.labels, kinds) > 0.9
    assert found.rand.mean() > 0.9
    assert found.apart
    assert f"on {KEPT:.0%} of them" in found.in_words
    assert grouped(distances, count=5).count == 5


def test_a_single_cloud_is_told_from_no_other_cloud():
    """It is cut into something all the same, whose groups come back better than by chance."""
    told = []
    for seed in range(5):
        found = grouped(clouds(seed, 20)[0], draws=5, seed=seed)
        told.append(found.apart)
        assert found.rand.mean() > 0.2
    assert sum(told) <= 1


def test_one_member_far_away_makes_no_groups():
    distances, _ = clouds(3, 71, 1, apart=30.0)
    found = grouped(distances)
    assert not found.apart
    assert "not above" in found.in_words


def test_clouds_are_as_long_in_each_direction_as_the_members():
    random = np.random.default_rng(4)
    places = random.normal(size=(40, 3)) * [3, 2, 1]
    found = np.sort(_sides(cdist(places, places)))[::-1]
    centred = places - places.mean(0)
    own = np.linalg.svd(centred, compute_uv=False) / 40**0.5
    assert found[:3] == pytest.approx(own)
    assert _between(places) == pytest.approx(cdist(places, places), abs=1e-6)
    assert _sides(np.zeros((4, 4))).tolist() == [0]
