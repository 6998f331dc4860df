"""The interval of the mean of other units."""

import math

import numpy as np
import pytest
from scipy import stats

import lens
from lens.stats.prediction import prediction


@pytest.mark.parametrize("more", [1, 4, None])
def test_it_is_the_closed_form_and_covers(more):
    values = np.array([0.3, 1.2, -0.4, 0.9])
    spread = values.std(ddof=1) * math.sqrt(1 / 4 + 1 / (more or 4))
    low, high = prediction(values, more)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 3) * spread)
    assert low + high == pytest.approx(2 * values.mean())
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(4000):
        low, high = prediction(generator.normal(size=4), more)
        held += low <= generator.normal(size=more or 4).mean() <= high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_what_tells_nothing_gives_nothing():
    assert all(map(math.isnan, prediction([1.0])))
    for values, more in (([], None), ([1.0, 2.0], 0)):
        with pytest.raises(lens.LensError, match="needs units and others"):
            prediction(values, more)
