"""`compare_series`: heads over several runs, by the same differences as `compare_runs`; what is not comparable is said."""

import numpy as np
import pytest

from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.runs import compare_runs, compare_series
from lens.runs.comparison.first_token import emerged
from lens.runs.comparison.pictures import first_token_curves
from tests.lens.test_comparison import METRICS, TEXTS, make_run

KEYS = ["prompts", "metric", "variant", "layer", "head"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    return [make_run(folder, seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("column", "place", "other"),
    [("since_last", 2, 1), ("since_first", 2, 0), ("since_first", 1, 0)],
)
def test_changes_are_the_differences_of_two_runs(runs, column, place, other):
    table = compare_series(runs).table()
    mine = table[table["place"] == place].set_index(KEYS)
    pair = compare_runs(runs[other], runs[place]).heads.set_index(KEYS)
    pair = pair[pair["n"] > 0]
    assert len(pair) > 10
    mine = mine.loc[pair.index]
    for source, end in (("difference", ""), ("low", "_low"), ("high", "_high"), ("n", "_n")):
        np.testing.assert_allclose(mine[column + end].to_numpy(float), pair[source].to_numpy(float))
    own = runs[place].heads
    text = own[
        (own["prompt_id"] == "text") & (own["metric"] == "induction") & (own["variant"] == "raw")
    ]
    found = table[
        (table["place"] == place) & (table["metric"] == "induction") & (table["prompts"] == "text")
    ]
    assert found["value"].tolist() == text["value"].tolist()
    assert (
        found["name"] == "L" + found["layer"].astype(str) + "H" + found["head"].astype(str)
    ).all()


def test_the_first_has_no_change_and_a_jump_is_named(runs):
    series = compare_series(runs)
    first = series.table().query("place == 0")
    assert first["since_last"].isna().all()
    said = of_kind(series.findings(), "jump")
    rows = (
        series.table()
        .dropna(subset=["since_last"])
        .query("variant == 'raw' and metric != 'entropy'")
    )
    sure = rows[(rows["since_last_low"] > 0) | (rows["since_last_high"] < 0)]
    top = sure.loc[sure["since_last"].abs().idxmax()]
    assert said[0].startswith(f"{top['name']} ")
    assert f"{top['since_last']:+.2f}" in said[0]
    figure = series.plot("induction", prompts="text", top=2)
    shown = [line for line in figure.data if line.showlegend]
    assert len(shown) == 2
    grid = (
        series.table()
        .query("metric == 'induction' and prompts == 'text' and variant == 'raw'")
        .pivot(index="name", columns="place", values="value")
    )
    spread = grid.max(axis=1) - grid.min(axis=1)
    assert {line.name for line in shown} == set(spread.nlargest(2).index)


def test_what_is_not_comparable_is_said_and_has_no_change(runs, tmp_path):
    others = make_run(tmp_path, 8, texts=(("x", "y"), ("z", "w")))
    wide = make_run(tmp_path, 9, shape=(2, 4))
    series = compare_series([runs[0], others, wide])
    assert "no prompt in common" not in " ".join(compare_series(runs).findings())
    table = series.table()
    assert table.query("place == 1")[["since_last", "since_first"]].isna().all(axis=None)
    # no line leads from heads to others of the same number
    for line in series.plot("induction").data:
        assert np.isnan(line.y[2]), line.name
        assert np.isfinite(line.y[[0, 1, 3]]).any()
    assert table.query("place == 2")[["since_last", "since_first"]].isna().all(axis=None)
    said = " ".join(series.findings())
    assert "cannot be matched by their number" in said
    assert "no prompt in common" in said
    assert "No head" not in said
    assert len(TEXTS) == 3


def test_a_series_is_two_runs_each_once(runs):
    for given in ([], runs[:1], [runs[0], runs[0]]):
        with pytest.raises(LensError, match="two runs or more"):
            compare_series(given)


def made_series(tmp_path, masses, prompts=3):
    """Runs whose heads all give the first token so much, half of them a little more and half less; chance is 0.2."""
    found = []
    for number, mass in enumerate(masses):
        scores = np.full((prompts, len(METRICS), 2, 3), 0.1)
        scores[:, METRICS.index("sink_mass")] = mass
        scores[:, METRICS.index("sink_mass"), 0] += 0.05
        scores[:, METRICS.index("sink_mass"), 1] -= 0.05
        scores += np.linspace(0, 0.01, prompts)[:, None, None, None]
        found.append(make_run(tmp_path, number, texts=TEXTS[:prompts], scores=scores))
    return compare_series(found)


def test_the_first_token_is_beyond_chance_where_its_interval_is(tmp_path):
    series = made_series(tmp_path, [0.15, 0.193, 0.4])
    rows = series.sinks
    expected = np.array([0.15, 0.193, 0.4]) + 0.005
    np.testing.assert_allclose(rows["mass"], expected)
    assert (rows["mass_low"] < rows["mass"]).all()
    assert rows["uniform"].tolist() == pytest.approx([0.2] * 3)
    (said,) = of_kind(series.findings(), "sinks")
    assert (
        f"at 1 of 3, for the first time at {series.names[2]}, where it gets 40% [39%, 42%]" in said
    )
    assert len(first_token_curves(series).data) == 3


def test_beyond_chance_is_not_said_where_a_run_lacks_it(tmp_path):
    table = made_series(tmp_path, [0.4, 0.41]).sinks
    table.loc[0, ["uniform", "random_weights"]] = np.nan
    (said,) = emerged(table)
    assert "what chance gives is not in all of these runs (uniform attention 20%" in said


def test_chance_of_other_prompts_is_a_range(tmp_path):
    table = made_series(tmp_path, [0.4, 0.41]).sinks
    table.loc[0, "uniform"] = 0.024
    (said,) = emerged(table)
    assert "at each of them (uniform attention 2% to 20%, " in said


@pytest.mark.parametrize(
    ("masses", "prompts", "match"),
    [
        ([0.19, 0.193], 3, "it is beyond chance at none"),
        ([0.3, 0.4], 3, "it is beyond chance at each of them (uniform attention 20%"),
        ([0.3, 0.1], 3, "it is beyond chance at 1 of 2, for the first time at"),
        ([0.1, 0.9], 1, "cannot be said of one prompt"),
    ],
)
def test_no_sink_is_said_where_there_is_none(tmp_path, masses, prompts, match):
    (said,) = of_kind(made_series(tmp_path, masses, prompts).findings(), "sinks")
    assert match in said
