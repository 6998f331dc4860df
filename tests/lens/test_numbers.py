"""The numbers of the embedded models are the recorded ones (recorded_numbers.py says how)."""

import json
import math

import pytest

from tests.lens.recorded_numbers import FILE, ROOMS

RELATIVE, ABSOLUTE = 1e-5, 1e-6
RECORDED = json.loads(FILE.read_text(encoding="utf-8"))


def moved(recorded, found):
    """One line for each name whose number is another, is gone or is not recorded."""
    return [
        f"{name}: {recorded.get(name, 'not recorded')} -> {found.get(name, 'no longer computed')}"
        for name in sorted(recorded.keys() | found.keys())
        if not (
            name in recorded
            and name in found
            and math.isclose(recorded[name], found[name], rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        )
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_numbers_are_the_recorded_ones(room):
    lines = moved(RECORDED[room], ROOMS[room]())
    assert not lines, "\n".join([f"{len(lines)} numbers of {room} moved:", *lines])


def test_every_recorded_room_is_computed():
    assert RECORDED.keys() == ROOMS.keys()
    assert sum(map(len, RECORDED.values())) > 200


def test_a_number_that_moves_vanishes_or_is_new_is_named():
    recorded = {"same": 2.0, "moved": 2.0, "gone": 1.0, "nan": 1.0, "tiny": 0.0}
    found = {"same": 2.0 + 1e-6, "moved": 2.001, "new": 3.0, "nan": math.nan, "tiny": 1e-8}
    assert moved(recorded, found) == [
        "gone: 1.0 -> no longer computed",
        "moved: 2.0 -> 2.001",
        "nan: 1.0 -> nan",
        "new: not recorded -> 3.0",
    ]
