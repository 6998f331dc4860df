"""Intervals against closed forms, which pin their level, and against numpy's; refusals."""

import numpy as np
import pytest

from lens import stats
from lens.common.errors import LensError
from lens.stats import intervals
from lens.stats.intervals import around, columns, known_mean, longer, of_share
from lens.stats.verdicts import leave_out_0, mean_told, of_many

T = {8: 2.306004, 40: 2.021075}  # of Student's t by its degrees of freedom: 2.5 % lie above it
Z = 1.959964  # of a normal


def test_the_middle_95_percent_of_even_draws():
    assert stats.LEVEL == 0.95
    low, high = stats.interval(np.arange(10001)[::-1])
    assert (low, high) == pytest.approx((250, 9750))
    assert stats.interval(np.arange(5)) == pytest.approx((0.1, 3.9))  # between two draws


def test_the_interval_of_a_mean_is_that_of_student():
    """Means of units drawn again are about normal; Student's t makes up for the units' spread being known from them alone."""
    units, seeds = 41, 200
    values = np.linspace(2.0, 5.0, units)
    error = values.std(ddof=1) / np.sqrt(units)
    ends = np.mean(
        [stats.over_units(values, np.ones(units), seed) for seed in range(seeds)], axis=0
    )
    # 200,000 draws place an end to 0.006 errors; 90 % instead of 95 % moves it by 0.32
    assert (ends - values.mean()) / error == pytest.approx([-T[40], T[40]], abs=0.03)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    """With a 1 in 5 of 9 units the ones of a draw are binomial: P(< 2) = 0.8 %, P(< 3) = 4.6 %,
    P(> 7) = 4.1 %, P(> 8) = 0.5 %, so that 2.5 % end at 2 and at 8, and 5 % at 3 and at 7: arms of three ones, longer
    as Student's are."""
    ones = np.arange(9) < 5
    drawn = [stats.over_units(ones, np.ones(9), seed) for seed in range(10)]
    arm = 3 / 9 * T[8] / Z * (9 / 8) ** 0.5
    assert np.array(drawn) == pytest.approx(np.tile([5 / 9 - arm, 5 / 9 + arm], (10, 1)))


@pytest.mark.parametrize("units", [2, 3, 4, 8, 32])
def test_about_one_interval_of_twenty_leaves_the_truth_out_however_few_units_there_are(units):
    """Not longer, it is every second one of two units and every fifth one of four."""
    values = np.random.default_rng(units).normal(size=(units, 4000))
    low, high = stats.over_units(values, np.ones_like(values), seed=0)
    assert leave_out_0(low, high).mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize("units", [2, 4, 8, 32])
def test_the_highest_of_24_is_above_nothing_by_chance_as_seldom(units):
    values = np.random.default_rng(units).normal(size=(units, 400, 24))
    low, high = stats.over_units(values, np.ones_like(values), seed=0)
    means = values.mean(0)
    found = [
        of_many(means[case, best], low[case, best], high[case, best], 24, units)[0] > 0
        for case, best in enumerate(means.argmax(-1))
    ]
    assert np.mean(found) <= 0.06


def test_intervals_end_where_values_do():
    """Shares stay shares, and of what never falls it is not said that it may."""
    low, high = stats.over_units(np.array([0.2, 0.7]), np.ones(2), seed=0)
    assert (low, high) == (0, 1)
    low, high = stats.over_units(np.array([2.0, 3.0]), np.ones(2), seed=0)
    assert low == 0
    assert high > 3
    low, high = stats.over_units(np.array([-2.0, -3.0]), np.ones(2), seed=0)
    assert low < -3
    assert high == 0


def test_a_statistic_of_few_units_has_the_longer_interval_too():
    """`around` of a mean is `over_units`."""
    values = np.random.default_rng(3).normal(size=(6, 5))
    drawn = stats.draws(6, 0) @ values / 6
    mine = around(values.mean(0), drawn, 6)
    theirs = stats.over_units(values, np.ones_like(values), 0)
    assert np.array(mine) == pytest.approx(np.array(theirs))
    low, high = around(values.mean(0), drawn, 6, least=-0.1, most=0.1)
    assert (low >= -0.1).all()
    assert (high <= 0.1).all()


def test_quantiles_are_those_of_numpy():
    random = np.random.default_rng(0)
    values = random.normal(size=(101, 7, 3))
    outside = (1 - stats.LEVEL) / 2
    expected = np.quantile(values, [outside, 1 - outside], axis=0)
    assert np.array(stats.interval(values)) == pytest.approx(expected)
    assert np.array(stats.interval(np.moveaxis(values, 0, 1), axis=1)) == pytest.approx(expected)
    assert stats.quantile(values, 0.99, axis=0) == pytest.approx(np.quantile(values, 0.99, axis=0))
    assert stats.quantile([4, 1, 3, 2], 0.5) == 2.5


def test_many_values_are_drawn_a_few_at_a_time(monkeypatch):
    """123,211 edges at six places took 6 GB of draws at once."""
    sums = np.random.default_rng(0).normal(size=(7, 3, 67))
    counts = np.ones_like(sums)
    whole = stats.over_units(sums, counts, seed=0)
    held = []
    middle = intervals.interval
    monkeypatch.setattr(intervals, "_AT_ONCE", 10_000)
    monkeypatch.setattr(intervals, "interval", lambda one: held.append(one.size) or middle(one))
    assert np.array(stats.over_units(sums, counts, seed=0)) == pytest.approx(np.array(whole))
    assert max(held) <= 10_000
    assert sum(held) == 3 * 67 * 1000


def test_draws_that_could_not_be_computed_are_left_out():
    random = np.random.default_rng(0)
    values = random.normal(size=(53, 11))
    values[random.random(values.shape) < 0.3] = np.nan
    values[1:, 2], values[0, 2] = np.nan, 7.0
    outside = (1 - stats.LEVEL) / 2
    expected = np.nanquantile(values, [outside, 1 - outside], axis=0)
    assert np.array(stats.interval(values)) == pytest.approx(expected)
    assert [ends[2] for ends in stats.interval(values)] == [7, 7]
    values[:, 3] = np.nan
    assert np.isnan([ends[3] for ends in stats.interval(values)]).all()
    assert np.isnan(stats.interval(np.empty((0, 3)))).all()
    assert all(isinstance(end, float) for end in (*stats.interval([]), *stats.interval([1, 2])))


def test_every_draw_has_as_many_units_as_there_are():
    drawn = stats.draws(7, 3)
    assert drawn.shape == (1000, 7)
    assert (drawn.sum(1) == 7).all()
    assert drawn.mean(0) == pytest.approx(np.ones(7), abs=0.15)
    assert (drawn == stats.draws(7, 3)).all()
    assert (drawn != stats.draws(7, 4)).any()
    with pytest.raises(ValueError, match="read-only"):
        drawn[0, 0] = 1  # it is the one that the next caller gets
    random = np.random.default_rng(3)
    assert (drawn[:19] == stats.draws(7, random, 19)).all()
    assert (drawn[:19] != stats.draws(7, random, 19)).any()


def test_the_mean_weighs_units_by_their_counts():
    sums, counts = np.array([[10.0], [0.0], [3.0]]), np.array([[1], [9], [2]])
    low, high = stats.over_units(sums, counts, 0)
    drawn = stats.draws(3, 0)
    ratios = sorted((drawn @ sums / (drawn @ counts))[:, 0])
    times = longer(3)
    assert low[0] == 0  # where the arm of the lower quantile ends below any value
    assert high[0] - 13 / 12 == pytest.approx(times * (np.quantile(ratios, 0.975) - 13 / 12))


def test_one_unit_has_no_interval():
    low, high = stats.over_units(np.array([[0.5, 0.5], [0.0, 0.7]]), np.array([[1, 1], [0, 1]]), 0)
    assert np.isnan([low[0], high[0]]).all()
    assert 0 == low[1] < 0.6 < high[1] == 1


def test_intervals_of_dependent_rows_are_wider_than_if_they_were_independent():
    """Rows that repeat 16 times carry 1/16 of the information: the interval must be about 4 times wider."""
    random = np.random.default_rng(0)
    low, high = stats.over_rows(random.normal(size=256), 0)
    repeated_low, repeated_high = stats.over_rows(np.repeat(random.normal(size=16), 16), 0)
    assert 2 < (repeated_high - repeated_low) / (high - low) < 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.interval(3.0), "expected several numbers, got a single one"),
        (lambda: stats.quantile([], 0.5), r"at least 1 value along axis -1, got \(0,\)"),
        (lambda: stats.quantile([1, 2], 95), "share must be 0 to 1, got 95"),
        (lambda: stats.draws(0, 0), "units and resamples must be at least 1, got 0 and 1000"),
        (lambda: stats.draws(3, 0, 0), "units and resamples must be at least 1, got 3 and 0"),
        (
            lambda: stats.over_units(np.ones((3, 2)), np.ones(3), 0),
            r"sums and counts must have one shape, got \(3, 2\) and \(3,\)",
        ),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(LensError, match=message):
        call()


def test_the_interval_of_a_share_holds_the_shares_that_it_is_no_surprise_for():
    """Wilson's ends are the shares p with |share - p| = z sqrt(p (1 - p) / n)."""
    for share, units in ((0.3, 20), (1.0, 10), (0.0, 7), (0.96, 360)):
        for end in of_share(share, units):
            assert abs(share - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / units), abs=1e-6)  # fmt: skip
    assert of_share(1.0, 10)[1] == 1.0
    with pytest.raises(LensError, match=r"share must be 0 to 1, got 1\.2"):
        of_share(1.2, 3)
    with pytest.raises(LensError, match="units must be a positive integer, got 0"):
        of_share(0.5, 0)


def test_a_mean_of_what_is_known_leaves_out_the_rest():
    values = np.random.default_rng(4).normal(size=(5, 6))
    values[np.random.default_rng(5).random(values.shape) < 0.4] = np.nan
    values[2], values[:, 1] = np.nan, np.nan
    for axis, lines in ((0, values.T), (1, values)):
        known = [line[~np.isnan(line)] for line in lines]
        expected = [np.sum(line) / len(line) if len(line) else np.nan for line in known]
        assert known_mean(values, axis) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_trials_that_all_did_alike_have_an_interval(alike):
    """Four that all came back do not say that the next one will; of scores that are equal nothing is made up."""
    values = np.array([[alike] * 4, [0.2, 0.4, 0.9, 1.0], [0.5] * 4])
    found, plain = (columns("x", values, 0, trials=one) for one in (True, False))
    assert (found["x_low"][0], found["x_high"][0]) == of_share(alike, 4)
    for end in ("x_low", "x_high"):
        np.testing.assert_array_equal(found[end][1:], plain[end][1:])
        assert plain[end][0] == alike
    one = columns("x", np.array([[alike]]), 0, trials=True)
    assert np.isnan([one["x_low"], one["x_high"]]).all()
    told = mean_told(np.full(4, alike), 0, ".2f", trials=True)
    assert told == {0.0: "0.00 [0.00, 0.49]", 1.0: "1.00 [0.51, 1.00]"}[alike]
