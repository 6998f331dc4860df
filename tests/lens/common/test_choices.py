"""One check for every argument that is one of a few words."""

from typing import Literal

import pytest

from lens.common.choices import check_choice, words
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
