"""Ranks, tau, Spearman's correlation and the top against naive twins and scipy; refusals."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from lens import stats
from lens.common.errors import LensError
from lens.stats.orders import random_orders, spearman_by_chance


def naive_tau(a, b):
    """Tau-b, pair by pair."""
    agree = ties_a = ties_b = pairs = 0
    for i in range(len(a)):
        for j in range(i):
            pairs += 1
            x, y = a[i] - a[j], b[i] - b[j]
            ties_a += x == 0
            ties_b += y == 0
            agree += int(x * y > 0) - int(x * y < 0)
    return agree / np.sqrt((pairs - ties_a) * (pairs - ties_b))


@pytest.mark.parametrize("items", [9, 40])
def test_one_of_20_orders_at_random_agrees_more_than_by_chance(items):
    random = np.random.default_rng(0)
    found = [stats.spearman(np.arange(items), random.permutation(items)) for _ in range(2000)]
    assert np.mean(np.abs(found) > spearman_by_chance(items)) == pytest.approx(0.05, abs=0.015)


def test_few_items_leave_no_order_out():
    """Of three every order is within 1, which says nothing; of more 5 of 100 are beyond."""
    assert [random_orders(items) for items in (1, 3, 4)] == ["", "", ""]
    assert random_orders(6) == "95 of 100 orders at random: within ±0.88"


def tau(a, b):
    found = stats.kendall(np.stack([a, b]))
    np.testing.assert_equal(found, found.T)
    return found[0, 1]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 22, 23])
@pytest.mark.parametrize("distinct", [3, 1000])
def test_tau_equals_its_definition_with_ties_and_without(n, distinct):
    values = np.random.default_rng(2).integers(0, distinct, (5, n))
    values[0], values[1] = np.arange(n), values[1, 0] - np.arange(n)  # not all of them constant
    found = stats.kendall(values)
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if len(set(a)) > 1 and len(set(b)) > 1:
                assert found[i, j] == pytest.approx(naive_tau(a, b), abs=1e-12)
            else:
                assert np.isnan(found[i, j])


def test_tau_of_many_draws_equals_that_of_scipy():
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 131)).round(1)
    found = stats.kendall(values)
    assert found.shape == (2, 3, 4, 4)
    for place in np.ndindex(2, 3):
        expected = [[kendalltau(a, b).statistic for a in values[place]] for b in values[place]]
        assert found[place] == pytest.approx(np.array(expected))


def test_tau_of_known_orders():
    order = np.array([5.0, 1.0, 3.0, 2.0])
    assert tau(order, 2 * order + 1) == 1
    assert tau(order, -order) == -1
    assert tau(np.arange(4), np.array([0, 1, 3, 2])) == pytest.approx(4 / 6)
    # 5 of 6 pairs differ in the second, 5 of these agree
    assert tau(np.arange(4), np.array([0, 1, 1, 2])) == pytest.approx(5 / np.sqrt(6 * 5))
    assert np.isnan(tau(order, np.ones(4)))
    found = stats.kendall(np.stack([order, order, np.array([1, 2, np.nan, 3])]))
    assert found[0, 1] == 1
    assert np.isnan(found[2]).all()


def test_tau_sees_differences_that_single_precision_does_not():
    close = 1 + np.arange(7) * 1e-12
    assert tau(close, np.arange(7)) == 1


def naive_ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def naive_spearman(a, b):
    return np.corrcoef(naive_ranks(a), naive_ranks(b))[0, 1]


def test_ranks_share_the_mean_of_ties():
    assert stats.ranks([30, 10, 20, 10]).tolist() == [4, 1.5, 3, 1.5]
    values = np.random.default_rng(0).integers(0, 6, (3, 17))
    assert stats.ranks(values).tolist() == [naive_ranks(row) for row in values]
    assert np.isnan(stats.ranks([1, np.nan, 2])).all()


def test_spearman_is_the_textbook_formula():
    random = np.random.default_rng(0)
    a, b = random.normal(size=17), random.integers(0, 5, size=17).astype(float)
    assert stats.spearman(a, b) == pytest.approx(naive_spearman(a, b))
    assert stats.spearman(a, np.exp(a)) == pytest.approx(1)
    assert stats.spearman(a, -a) == pytest.approx(-1)
    assert stats.spearman(np.r_[a, np.nan, 5], np.r_[b, 9, np.inf]) == stats.spearman(a, b)
    assert np.isnan(stats.spearman(a, np.ones(17)))
    assert np.isnan(stats.spearman([], []))
    assert np.isnan(stats.spearman([1, 2], [1, np.nan]))


def test_the_top_is_the_largest_first_ties_by_place():
    assert stats.top([3, 9, 9, 1, np.nan], 3).tolist() == [1, 2, 0]
    assert stats.top([[1, 2], [2, 1]], 1).tolist() == [[1], [0]]
    assert stats.top([-5, 2], 0).tolist() == []


def test_overlap_is_of_the_largest():
    """The two largest of both are the same heads; the two smallest share one, the three smallest all."""
    a, b = [9, 8, 3, 2, 1], [8, 9, 1, 2, 3]
    shares = [stats.top_overlap([a, b], k)[0, 1] for k in (1, 2, 3, 4, 5)]
    assert shares == pytest.approx([0, 1, 2 / 3, 3 / 4, 1])
    lowest = [stats.top_overlap(np.negative([a, b]), k)[0, 1] for k in (1, 2, 3)]
    assert lowest == pytest.approx([0, 1 / 2, 1])


def test_what_is_not_known_is_at_no_top():
    one, two = [5, np.nan, np.nan, np.nan], [np.nan, np.nan, np.nan, 5]
    assert np.isnan(stats.top_overlap([one, two], 3)).all()
    assert stats.top_overlap([one, [4, 3, 2, 1]], 1).tolist() == [[1, 1], [1, 1]]
    some = stats.top_overlap([one, [4, 3, 2, 1]], 2)
    assert np.isnan(some).tolist() == [[True, True], [True, False]]


def test_overlap_of_many_draws_equals_that_of_sets():
    values = np.random.default_rng(0).integers(0, 9, (7, 3, 13))
    found = stats.top_overlap(values, 4)
    for draw, i, j in np.ndindex(7, 3, 3):
        tops = [
            set(sorted(range(13), key=lambda at: (-values[draw, one, at], at))[:4])
            for one in (i, j)
        ]
        assert found[draw, i, j] == len(tops[0] & tops[1]) / 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.kendall([1, 2, 3]), r"measures, n\], got shape \(3,\); stack them"),
        (lambda: stats.top_overlap([1, 2, 3], 1), r"measures, n\], got shape \(3,\)"),
        (lambda: stats.top_overlap([[1, 2], [2, 1]], 0), "k must be 1 to 2, the number of values"),
        (lambda: stats.top([1, 2], 3), "k must be 0 to 2, the number of values, got 3"),
        (lambda: stats.spearman([1, 2], [1, 2, 3]), r"got shapes \(2,\) and \(3,\)"),
    ],
)
def test_what_has_no_order_is_refused(call, message):
    with pytest.raises(LensError, match=message):
        call()
