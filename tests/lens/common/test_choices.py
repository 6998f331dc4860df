"""One check for every argument that is one of a few words."""

from typing import Literal

import numpy as np
import pytest

from lens.common.choices import check_choice, check_counts, words
from lens.common.errors import LensError

Rule = Literal["mask", "drop"]


def test_a_choice_is_given_back():
    assert check_choice("rule", "drop", Rule) == "drop"
    assert check_choice("rule", "drop", {"drop": 1, "mask": 2}) == "drop"
    assert words(Rule) == ("mask", "drop")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("masc", r"^rule must be one of 'mask', 'drop', got 'masc'; did you mean 'mask'\?$"),
        ("zzz", r"^rule must be one of 'mask', 'drop', got 'zzz'$"),
        (None, r"^rule must be one of 'mask', 'drop', got None$"),
        (["mask"], r"got \['mask'\]"),
    ],
)
def test_anything_else_is_refused(value, message):
    with pytest.raises(LensError, match=message):
        check_choice("rule", value, Rule)


def test_what_would_be_done_more_than_a_million_times_is_refused():
    check_counts(draws=10**6, length=10**9)
    with pytest.raises(LensError, match=r"^draws must be at most 1,000,000, got 1000001$"):
        check_counts(steps=10**6, draws=10**6 + 1)
    with pytest.raises(LensError, match=r"^rounds of Routing must be at most 1,000,000, got 1000"):
        check_counts(0, **{"rounds of Routing": 10**18})


def test_whole_numbers_pass():
    check_counts(draws=1, seeds=np.int64(3))
    check_counts(0, first=0)


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", True, None, np.nan])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(LensError, match=r"^draws must be a positive integer, got"):
        check_counts(seeds=1, draws=value)
    with pytest.raises(LensError, match=r"^draws must be an integer of at least 2, got 1$"):
        check_counts(2, draws=1)
