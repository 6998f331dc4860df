"""First screens of two runs and of a series: a change is told beside what the median head changes by, or not at all."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lens.runs import compare_runs, compare_series
from lens.runs.comparison.headlines import of_comparison, of_series
from tests.lens.test_comparison import make_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return compare_runs(make_run(folder, 0), make_run(folder, 1))


def told(comparison, changes, *, metric="previous_token", half=0.02, prompts="text"):
    """What is said where the heads change by so much in one score, with intervals of so much to either side."""
    heads = comparison.heads
    rows = heads[
        (heads["metric"] == metric) & (heads["prompts"] == prompts) & (heads["variant"] == "raw")
    ].copy()
    size = np.resize(np.asarray(changes, float), len(rows))
    rows = rows.assign(a=0.5, b=0.5 + size, difference=size, low=size - half, high=size + half)
    return of_comparison(replace(comparison, heads=rows, losses=comparison.losses.iloc[:0]))


def test_the_head_that_changes_most_is_told_beside_the_median_head(pair):
    count = len(pair.heads.drop_duplicates(["layer", "head"]))
    changes = np.resize([0.004, -0.006, 0.005], count)
    changes[1] = -0.3
    (shown,) = told(pair, changes)
    row = pair.heads.drop_duplicates(["layer", "head"]).iloc[1]
    assert shown.headline.text == (
        f"L{row['layer']}H{row['head']} previous token on text falls by 0.3 [0.28, 0.32], from 0.50 in A to 0.20 in B; "
        "the median head's changes by 0.005."
    )
    assert (shown.headline.low, shown.headline.value, shown.headline.high) == pytest.approx(
        (0.28, 0.3, 0.32)
    )
    assert shown.headline.baseline == pytest.approx(0.005)
    assert shown.picture is not None


@pytest.mark.parametrize(
    "given",
    [
        {"changes": 0.2},  # all alike: no head stands out
        {"changes": 0.004},  # below what two decimals show
        {"changes": [0.3, 0.0], "half": np.nan},  # a single prompt has no interval
        {"changes": [0.3, 0.0], "half": 0.4},  # the interval holds what others change by
        {"changes": [1.0, 0.0], "metric": "sink_rate"},  # a threshold was crossed, no more
    ],
)
def test_what_would_be_false_is_not_told(pair, given):
    assert told(pair, given.pop("changes"), **given) == []


@pytest.mark.parametrize(("low", "high", "said"), [(0.4, 0.6, 1), (-0.1, 1.1, 0)])
def test_a_loss_is_told_where_its_interval_leaves_out_nothing(pair, low, high, said):
    losses = pair.losses.iloc[:1].assign(what="loss", a=2.0, b=2.5, difference=0.5)
    found = of_comparison(
        replace(pair, heads=pair.heads.iloc[:0], losses=losses.assign(low=low, high=high))
    )
    assert [one.headline.text for one in found] == [
        "The loss on text rises by 0.5 [0.4, 0.6], from 2.00 nats a token in A to 2.50 in B."
    ][:said]


def test_a_loss_is_called_by_its_prompts_and_not_told_below_rounding(pair):
    losses = pair.losses.iloc[:1].assign(what="loss", prompts="sound", a=2.0, b=2.5)
    for change, said in ((0.5, ["The loss on sounds rises by 0.5"]), (1e-6, [])):
        ends = {"difference": change, "low": 0.9 * change, "high": 1.1 * change}
        found = of_comparison(replace(pair, heads=pair.heads[:0], losses=losses.assign(**ends)))
        assert [one.headline.text[:31] for one in found] == said


def jumped(tmp_path):
    """A series of three runs in which one head changes from the second to the third."""
    runs = [make_run(tmp_path, seed) for seed in range(3)]
    series = compare_series(runs)
    heads = series.heads.copy()
    steps = ["since_last", "since_last_low", "since_last_high"]
    heads[steps] = 0.0
    jump = (heads["place"] == 2) & heads["name"].eq("L1H0") & (heads["variant"] == "raw")
    heads.loc[jump, steps] = [0.4, 0.35, 0.45]
    return replace(series, heads=heads, losses=series.losses.iloc[:0])


def test_a_step_to_other_prompts_has_no_ends(tmp_path):
    """What the last run has is a mean over its own prompts, and the change one over those that both have."""
    series = jumped(tmp_path)
    last = series.runs[2]
    longer = [[*row, "more"] for row in last.prompts["token_strings"]]
    vars(last)["prompts"] = last.prompts.assign(token_strings=pd.Series(longer, last.prompts.index))
    (one,) = of_series(series)
    assert f"[0.35, 0.45], from {series.names[1]} to {series.names[2]}; " in one.headline.text


def test_a_series_tells_its_steps_and_no_head_twice(tmp_path):
    series = jumped(tmp_path)
    found = of_series(series)
    assert len(found) == 1
    assert found[0].headline.text.startswith("L1H0 ")
    assert f"in {series.names[1]} to " in found[0].headline.text
    assert found[0].picture
    lines: Any = found[0].picture.data
    assert [line.name for line in lines if line.showlegend] in ([], ["L1H0"])
    assert max(line.line.width for line in lines if line.name == "L1H0") == 2


def test_of_a_loss_the_largest_step_is_told_and_not_the_surest(tmp_path):
    series = jumped(tmp_path)
    steps = pd.DataFrame(
        {
            "prompts": "copied",
            "what": "loss_repeat",
            "place": [1, 2],
            "a": [5.7, 3.4],
            "b": [3.4, -0.6],
        }
        | {"difference": [-2.3, -4.0], "low": [-2.8, -7.0], "high": [-1.8, -1.0], "n": 4}
    )
    found = of_series(replace(series, losses=steps))
    (told,) = (one.headline.text for one in found if "loss" in one.headline.text)
    assert f"falls by 4 [0.063, 7.9], from 3.40 nats a token in {series.names[1]}" in told


def test_a_kind_of_head_that_a_run_did_not_measure_is_not_counted_as_none(tmp_path):
    runs = [make_run(tmp_path, seed) for seed in range(2)]
    series = compare_series(runs)
    vars(runs[1])["heads"] = runs[1].heads.query("metric != 'induction'")
    said = next(one for one in series.findings() if one.startswith("Induction"))
    assert f"not measured at {series.names[1]}" in said
