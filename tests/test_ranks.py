"""Processes of one sequence: what one of them complained of is told at once, though the others wait for it."""

import os
import time
from pathlib import Path

import pytest

from tests import ranks


def main(folder: Path) -> None:
    """One fails; the others would wait for it."""
    if os.environ["RANK"] == "2":
        raise ValueError("the third has no such part")
    time.sleep(30)
    (folder / os.environ["RANK"]).touch()


def test_a_process_that_fails_ends_the_others_and_is_told(tmp_path):
    with pytest.raises(AssertionError, match="ValueError: the third has no such part"):
        ranks.run("tests.test_ranks", tmp_path)
    assert not list(tmp_path.iterdir())
