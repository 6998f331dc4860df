"""Planted patterns come back as groups, with principal components beside; pooling beside loops."""

import numpy as np
import pytest

import lens
from lens import stats
from lens.common.errors import LensError
from lens.vision._autoencoder import Encoded
from lens.vision.patterns import _grouped, _overlaps
from tests.lens.pictures import planted

KINDS = ("diagonal", "previous", "vertical", "uniform", "local", "strided")
SIDE, COPIES = 4, 6  # 16 patches; maps of each kind


def pattern(kind, random, count=SIDE * SIDE):
    """[patches, patches] of one kind, with noise of a size of its own."""
    query, key = np.indices((count, count))
    held = {
        "diagonal": query == key,
        "previous": key == np.maximum(query - 1, 0),
        "vertical": key == 5,
        "uniform": np.ones((count, count)),
        "local": query // 4 == key // 4,
        "strided": query % 4 == key % 4,
    }[kind].astype(float)
    held /= held.sum(-1, keepdims=True)
    noise = random.dirichlet(np.full(count, 3.0), count)
    share = random.uniform(0.1, 0.3)
    return (1 - share) * held + share * noise


@pytest.fixture(scope="module")
def drawn():
    """Kind of every map, in an order that says nothing, and the maps as two pictures of 3 layers with 6 heads."""
    random = np.random.default_rng(0)
    kinds = random.permutation(np.repeat(np.arange(len(KINDS)), COPIES))
    maps = np.stack([pattern(KINDS[kind], random) for kind in kinds])
    return kinds, maps.reshape(2, 3, 6, *maps.shape[1:])


@pytest.fixture(scope="module")
def found(drawn):
    traces = [planted(one, SIDE, SIDE) for one in drawn[1]]
    return lens.vision.patterns(traces, steps=150, draws=5, progress=False)


def test_planted_patterns_come_back_beside_principal_components(drawn, found):
    kinds, _ = drawn
    assert stats.adjusted_rand(kinds, found.found.labels) > 0.9
    assert stats.adjusted_rand(kinds, found.baseline.labels) > 0.9
    assert found.found.groups.rand.mean() > 0.9
    assert found.agreement > 0.9
    assert found.found.missed < 0.2
    assert [one.kind for one in found.findings()] == ["groups", "baseline", "heads"]
    assert "fall into 6 patterns" in found.findings()[0]


def test_maps_of_one_kind_are_in_no_groups():
    """Uniform attention with noise: a cut is shown, and the sentence says that it is none of nature."""
    random = np.random.default_rng(7)
    maps = random.dirichlet(np.full(16, 20.0), (2, 3, 6, 16))
    found = lens.vision.patterns(
        [planted(one, SIDE, SIDE) for one in maps], steps=20, draws=5, progress=False
    )
    for one in (found.found, found.baseline):
        assert not one.groups.apart
    assert "are in no groups that are told apart" in found.findings()[0]


def test_a_few_maps_that_stand_out_do_not_leave_all_others_in_one_group():
    """Three clouds of 40 and two maps far away: by average linkage they would be two groups, 120 and 2."""
    random = np.random.default_rng(4)
    kinds = np.repeat([0, 1, 2, 3], [40, 40, 40, 2])
    middles = np.array([[0.0, 0], [3, 0], [0, 3], [30, 30]])
    latent = middles[kinds] + random.normal(size=(122, 2)) * 0.5
    found = _grouped(
        "pca", Encoded(latent, lambda some: np.zeros((len(some), 8, 8)), 0.0), None, 10, 0
    )
    assert stats.adjusted_rand(kinds, found.labels) > 0.9
    assert np.bincount(found.labels).max() == 40
    assert found.groups.rand.mean() > 0.9
    assert found.groups.apart


def test_a_prototype_is_the_pattern_of_its_group(drawn, found):
    kinds, maps = drawn
    roots = np.sqrt(16 * maps.reshape(-1, 16, 16))
    for one in (found.found, found.baseline):
        for group in range(6):
            mean = roots[one.labels == group].mean(0)
            assert np.sqrt(np.square(one.prototypes[group] - mean).mean()) < 0.2
    assert set(kinds) == set(range(6))


def test_tables_say_which_map_is_which(drawn, found):
    kinds, _ = drawn
    table = found.table()
    assert table["name"].tolist()[:7] == [*(f"L0H{head}" for head in range(6)), "L1H0"]
    assert table["picture"].tolist() == [0] * 18 + [1] * 18
    heads = found.heads()
    assert len(heads) == 18
    shares = heads[[f"group_{group}" for group in range(6)]].to_numpy()
    assert shares.sum(1) == pytest.approx(np.ones(18))
    own = found.found.labels.reshape(2, 18)
    assert (heads["share"] == 1).to_numpy().tolist() == (own[0] == own[1]).tolist()
    assert len(kinds) == len(table)


def test_heads_in_another_order_fall_into_the_same_groups(drawn, found):
    order = np.random.default_rng(1).permutation(6)
    traces = [planted(one[:, order], SIDE, SIDE) for one in drawn[1]]
    again = lens.vision.patterns(traces, steps=150, draws=1, progress=False)
    for one, other in ((found.found, again.found), (found.baseline, again.baseline)):
        before = one.labels.reshape(2, 3, 6)[:, :, order].ravel()
        assert stats.adjusted_rand(before, other.labels) == 1.0


def test_patches_that_stand_window_by_window_make_the_same_maps(drawn):
    order = [row * 4 + column for top in (0, 2) for left in (0, 2)
             for row in (top, top + 1) for column in (left, left + 1)]  # fmt: skip
    plain = drawn[1][0]
    moved = plain[:, :, order][..., order]
    first, second = (
        lens.vision.patterns(trace, count=3, steps=1, draws=1, progress=False)
        for trace in (planted(plain, 4, 4), planted(moved, 4, 4, order))
    )
    assert np.allclose(first.baseline.latent, second.baseline.latent, atol=1e-4)


def test_block_means_are_those_of_fine_cells():
    random = np.random.default_rng(2)
    for length, parts in ((16, 8), (12, 8), (5, 8), (37, 16)):
        line = random.normal(size=length)
        fine = np.repeat(line, parts).reshape(parts, length).mean(1)
        assert _overlaps(length, parts) @ line == pytest.approx(fine)


def test_what_cannot_be_summarised_is_refused(drawn):
    trace = planted(drawn[1][0][:1, :3], SIDE, SIDE)
    with pytest.raises(LensError, match="4 to 4,096 maps are summarised, got 3"):
        lens.vision.patterns(trace, progress=False)
    whole = planted(drawn[1][0], SIDE, SIDE)
    with pytest.raises(LensError, match="count must be 2 to 17"):
        lens.vision.patterns(whole, count=18, progress=False)
    with pytest.raises(LensError, match="come from one model"):
        lens.vision.patterns([whole, trace], progress=False)
    with pytest.raises(LensError, match="steps must be a positive integer, got 0"):
        lens.vision.patterns(whole, steps=0)
    text = lens.capture(lens.load("text-lm-3l"), "It was the best of times", progress=False)
    with pytest.raises(LensError, match="the patches of this trace are not known"):
        lens.vision.patterns(text)
