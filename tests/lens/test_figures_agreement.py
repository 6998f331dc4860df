"""Figures of measures against each other show the numbers of their tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens.common.errors import LensError
from lens.figures.agreement import agreement_map, measure_scatter
from lens.heads.measures.agreements import COLUMNS, Agreement


def some_agreement(tau=(0.5, -0.25, np.nan)):
    pairs = [("a", "b"), ("a", "c <i>"), ("b", "c <i>")]
    rows = [
        (*pair, value, value - 0.1, value + 0.1, 0.5, 0.25, 0.75, 0.125)
        for pair, value in zip(pairs, tau, strict=True)
    ]
    tops = dict.fromkeys(("a", "b", "c <i>"), ("L0H0", "L0H1", "L0H2", "L0H3"))
    return Agreement(pd.DataFrame(rows, columns=list(COLUMNS)), 4, (7, 7, 7), 0, tops)


def test_a_sentence_names_six_of_many_heads():
    names = {"a": tuple(f"L0H{i}" for i in range(9)), "b": tuple(f"L1H{i}" for i in range(9))}
    first, *_ = replace(some_agreement(), k=9, tops={**names, "c <i>": names["a"]}).findings()
    assert "L0H0, L0H1, L0H2, L0H3, L0H4, L0H5 and 3 more only by a; " in first
    assert "L1H5 and 3 more only by b; " in first


def test_of_a_single_prompt_no_interval_is_written():
    found = some_agreement((0.5, -0.25, 0.125))
    alone = replace(found, rows=found.rows.assign(tau_low=np.nan, tau_high=np.nan))
    assert "a and b: tau 0.50, top 4 share" in repr(alone)


def test_the_map_has_every_pair_both_ways():
    figure = agreement_map(some_agreement())
    (drawn,) = figure.data
    assert list(drawn.x) == ["a", "b", "c &lt;i&gt;"]
    expected = [[1, 0.5, -0.25], [0.5, 1, np.nan], [-0.25, np.nan, 1]]
    np.testing.assert_array_equal(np.array(drawn.z, float), expected)
    assert "top 4 shared 50% (by chance 12%)" in drawn.text[1][0]
    assert figure.layout.title.text.endswith("between a and c &lt;i&gt;, tau -0.25 [-0.36, -0.14]")
    assert "no pair" in agreement_map(some_agreement((np.nan,) * 3)).layout.title.text


def test_the_scatter_has_intervals_where_they_are_known():
    table = pd.DataFrame(
        {
            "name": ["L0H0", "L0H1"],
            "gradient": [1.0, 2.0],
            "gradient_low": [0.5, 1.75],
            "gradient_high": [1.25, 3.0],
            "size": [5.0, 6.0],
        }
    )
    (drawn,) = measure_scatter(table, "gradient", "size").data
    assert list(drawn.error_x.array) == [0.25, 1.0]
    assert list(drawn.error_x.arrayminus) == [0.5, 0.25]
    assert drawn.error_y.array is None
    assert list(drawn.text) == ["L0H0", "L0H1"]
    with pytest.raises(
        LensError,
        match="expected a table with the columns magic, size, got the columns name, gradient",
    ):
        measure_scatter(table, "magic", "size")
