"""The public face of lens.stats: few names, all of them seen, scipy on first use."""

import doctest
import subprocess
import sys

import numpy as np

import lens
from lens import stats
from tests import shapes


def test_every_name_is_seen_and_there():
    assert len(stats.__all__) <= 15
    assert set(stats.__all__) <= set(dir(stats))
    for name in stats.__all__:
        assert getattr(stats, name) is not None


def test_the_examples_are_true():
    outcome = doctest.testmod(stats, extraglobs={"lens": lens, "np": np})
    assert outcome.attempted > 1
    assert outcome.failed == 0


def test_intervals_need_neither_scipy_nor_torch():
    code = (
        "import sys; from lens import stats; stats.interval([1, 2, 3]); stats.top([1, 2], 1)\n"
        "stats.cut_tree, stats.kendall\n"
        "sys.exit(' '.join({'scipy', 'torch', 'pandas', 'xarray'} & {*sys.modules}) or 0)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=shapes.ROOT)
    assert result.returncode == 0, result.stderr
