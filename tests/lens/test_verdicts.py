"""What is said of an interval that holds the number it is compared with: that nothing is told apart, never the mean alone."""

import numpy as np
import pytest

import lens
from lens.common.results import of_kind
from lens.policies.running import PolicyRuns
from lens.policies.stability import PolicyStability
from lens.stats import over_units
from lens.stats.verdicts import by_chance, of_many, of_many_told, rivals, verdict


def test_a_verdict_is_that_of_the_whole_interval():
    assert verdict(0.1, 0.3) == "above"
    assert verdict(-0.3, -0.1) == "below"
    assert verdict(-0.1, 0.3) == verdict(0.0, 0.3) == verdict(-0.3, 0.0) == "not told apart"
    assert verdict(np.nan, np.nan) == "not told apart"
    assert verdict(0.1, 0.3, beside=0.2) == "not told apart"
    assert verdict(0.1, 0.3, beside=0.5) == "below"


def test_the_highest_of_many_is_above_nothing_by_chance_in_one_of_twenty():
    """Of 24 members that are all 0 the highest has a plain interval above 0 in half of the cases."""
    random = np.random.default_rng(0)
    plain = corrected = 0
    for _ in range(400):
        values = random.normal(size=(24, 60))
        ends = over_units(values.T, np.ones((60, 24)), 0)
        best = int(values.mean(1).argmax())
        low, high = (float(end[best]) for end in ends)
        plain += low > 0
        corrected += of_many(float(values[best].mean()), low, high, 24, 60)[0] > 0
    assert plain / 400 == pytest.approx(0.5, abs=0.1)
    assert corrected < 400 / 15


def test_what_is_one_of_one_is_not_widened():
    assert of_many(1.0, 0.5, 2.0, 1, 8) == pytest.approx((0.5, 2.0))
    with pytest.raises(lens.LensError, match="many"):
        of_many(1.0, 0.5, 2.0, 0, 8)


def test_the_interval_of_one_of_many_ends_where_values_do():
    """Shares were said to lie from below 0 to above 1."""
    low, high = of_many(0.5, 0.1, 0.9, 24, 9)
    assert low < 0
    assert high > 1
    assert of_many(0.5, 0.1, 0.9, 24, 9, least=0, most=1) == (0, 1)
    assert of_many(0.5, 0.1, 0.9, 24, 9, least=0) == pytest.approx((0, high))
    assert np.isnan(of_many(0.5, np.nan, np.nan, 24, 9, least=0, most=1)).all()
    row = {"value": 0.5, "low": 0.1, "high": 0.9}
    assert of_many_told(row, "value", ".0%", 24, 9, plain=True, least=0, most=1) == "50% [0%, 100%]"
    row = {"size": 3.0, "size_low": np.nan, "size_high": np.nan}
    assert of_many_told(row, "size", ".1f", 24, 9, unit=" times") == "3.0 times"


def test_rivals_are_those_whose_difference_may_be_none():
    values = np.array([[5.0, 5.1, 4.9, 5.0], [4.0, 4.1, 3.9, 4.0], [9.0, 1.0, 8.0, 1.5]])
    assert rivals(values, 0, 0) == [2]  # scatters so far that it may be higher
    assert rivals(values[:2], 0, 0) == []
    assert rivals(values[:, :1], 2, 0) == []  # a single prompt has no interval


def test_the_highest_of_noise_has_rivals():
    """By plain intervals some of 24 alike were told apart from the highest one nearly always."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(60, 24, 12))
    apart = [len(rivals(one, int(one.mean(1).argmax()), 0)) < 23 for one in noise]
    assert np.mean(apart) < 0.35


def test_chance_counts_a_level_of_95_percent():
    assert by_chance(100) == pytest.approx(5)
    assert by_chance(100, sides=1) == pytest.approx(2.5)


def runs(change, sign=-1):
    """Four prompts, one policy."""
    dense = np.full(4, 2.0)
    return PolicyRuns(
        dense, dense + np.array([change]), np.zeros((1, 4)), np.array([0.5]), ("P",), "loss", sign, None, 0, "m"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (runs([0.5, 0.4, 0.6, 0.5]), "(worse)"),
        (runs([-0.5, -0.4, -0.6, -0.5]), "(better)"),
        (runs([0.5, 0.4, 0.6, 0.5], sign=1), "(better)"),
        (runs([0.5, -0.4, 0.6, -0.5]), "(not told apart from dense)"),  # worse on the mean
    ],
)
def test_a_policy_is_worse_where_its_interval_is(found, said):
    assert f"] {said}; KL" in of_kind(found.findings(), "change")[0]


def kept(*efficiency):
    """Blocks of another prompt, by the efficiency of each prompt's on the others."""
    pairs = np.repeat(efficiency, len(efficiency) - 1)
    values = np.zeros((7, len(pairs), 1, 1))
    values[3, :, 0, 0] = values[6, :, 0, 0] = pairs
    return PolicyStability({"repeat": np.ones_like(values), "prompt": values}, 0.2, (0,), 0, "m")


def claim(*efficiency):
    """What is said of another prompt's blocks."""
    found = kept(*efficiency)
    return found.claims()["verdict"][0], of_kind(found.findings(), "claim")[0]


def test_pairs_are_no_units_of_their_own():
    """Each prompt's value stands in as many pairs as there are others: the interval is that of the prompts."""
    random = np.random.default_rng(0)
    found = [kept(*random.normal(0.9, 0.05, 6)).claims()["verdict"][0] for _ in range(100)]
    assert found.count("not told apart") > 75  # of pairs 57
    assert claim(0.5, 0.6)[0] == "not told apart"  # one pair in two orders


def test_a_claim_holds_or_not_or_is_not_told():
    assert claim(0.95, 0.96, 0.94)[0] == "does not hold"
    assert claim(0.5, 0.6, 0.4)[0] == "holds"
    verdict, said = claim(0.8, 0.99, 0.97)  # 0.92 on the mean
    assert verdict == "not told apart"
    assert "cannot be told here (efficiency 0.920 [0.597, 1.000], beside 0.9)" in said
    assert claim(0.95, 0.95)[0] == "not told apart"  # one pair
