"""p values beside draws, and what sets share: against counting."""

import numpy as np
import pytest

from lens import stats
from lens.stats.controls import jaccard, others, p_value
from lens.stats.intervals import columns


def test_p_counts_the_found_one_and_ties():
    assert p_value(0.5, [0.1, 0.5, 0.9, 0.2]) == (1 + 2) / 5
    assert p_value(0.1 + 0.2, [0.3]) == 1  # as much but for rounding
    assert p_value(2, np.zeros(19)) == 1 / 20
    assert p_value(0, []) == 1


def test_what_is_not_known_has_no_small_p():
    assert np.isnan(p_value(np.nan, np.zeros(99)))
    assert p_value(1, np.full(99, np.nan)) == 1  # no draw counts
    assert p_value(1, [0, np.nan, 2, 0]) == (1 + 1) / (1 + 3)


def test_others_are_as_many_that_were_not_chosen():
    chosen = np.zeros((3, 5), bool)
    chosen[0, [0, 3]] = chosen[2, :4] = True
    draws = [others(chosen, np.random.default_rng(seed)) for seed in range(60)]
    within = [others(chosen, np.random.default_rng(seed), within=True) for seed in range(60)]
    for drawn in draws + within:
        assert not (drawn & chosen).any()
    assert {drawn.sum() for drawn in draws} == {6}
    assert {tuple(drawn.sum(1)) for drawn in within} == {(2, 0, 1)}  # of layer 2 one is left
    for found, free in ((draws, ~chosen), (within, ~chosen & chosen.any(1)[:, None])):
        assert (np.any(found, 0) == free).all()  # each of them at times
    free = np.eye(3, 5, dtype=bool)
    few = others(chosen, np.random.default_rng(0), free)
    assert (few == free).all()


def test_jaccard_is_that_of_sets():
    draw = np.random.default_rng(0)
    sets = draw.random((5, 13)) < 0.4
    found = jaccard(sets)
    for one, mine in enumerate(sets):
        for other, its in enumerate(sets):
            a, b = set(np.flatnonzero(mine)), set(np.flatnonzero(its))
            assert found[one, other] == pytest.approx(len(a & b) / len(a | b))
    nothing = np.zeros((2, 3), bool)
    assert jaccard(nothing).tolist() == [[1, 1], [1, 1]]
    assert np.isnan(jaccard(nothing, empty=np.nan)).all()


def test_columns_are_the_mean_and_the_interval_over_the_last_axis():
    values = np.random.default_rng(1).normal(size=(2, 3, 7))
    found = columns("value", values, 5)
    assert list(found) == ["value", "value_low", "value_high"]
    assert list(columns("value", values, 5, plain=True)) == ["value", "low", "high"]
    low, high = stats.over_units(np.moveaxis(values, -1, 0), np.ones((7, 2, 3)), 5)
    np.testing.assert_allclose(found["value"], [row.mean() for row in values.reshape(6, 7)])
    np.testing.assert_allclose(found["value_low"], low.ravel())
    np.testing.assert_allclose(found["value_high"], high.ravel())
    one = columns("x", values[0, 0], 0)
    assert one["x"].shape == (1,)
    assert np.isnan(columns("x", values[..., :1], 0)["x_low"]).all()
