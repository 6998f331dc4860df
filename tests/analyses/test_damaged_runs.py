"""Damaged run folders beside a good one, and damaged model folders: nothing fails raw, hangs, or takes a gigabyte.

`python tests/benchmarks/damaged.py --folders 600 --models 60` tries more.
"""

import pytest

from tests.benchmarks.damaged import SMALL, bases, tried, tried_models


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param([0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 17, 18], id="each kind of file"),
        pytest.param([2, 8, 13, 15, 16, *range(19, 50)], id="more", marks=pytest.mark.exhaustive),
    ],
)
def test_no_damage_fails_raw(tmp_path, seeds):
    made = bases(tmp_path, (SMALL, f"{SMALL} --seed 1"))
    answers = list(tried(tmp_path / "damaged", made, seeds))
    assert [one for failed, _ in answers for one in failed] == []
    recorded = ("", "old folder", "all fitted")  # then nothing tells what was written
    valid = [one for _, one in answers]
    assert [one for one in valid if not one.endswith(recorded) and "log.txt" not in one] == []


@pytest.mark.parametrize(
    "seeds", [range(1, 3), pytest.param(range(3, 12), marks=pytest.mark.exhaustive)], ids=str
)
def test_no_damaged_model_folder_fails_raw(tmp_path, seeds):
    assert [one for failed in tried_models(tmp_path, seeds) for one in failed] == []
