"""A user's own numbers in a run: table, intervals, headline, and what is refused."""

import numpy as np
import pandas as pd
import pytest

import lens
from lens.common.errors import LensError
from lens.runs import add, open_run
from lens.runs.validation import validate
from lens.runs.writer import RunWriter
from lens.stats import over_units

LAYERS, HEADS, PROMPTS = 3, 5, 7


@pytest.fixture
def run(tmp_path):
    """A run without prompts, of a model that has heads in two of three layers."""
    model = {"name": "made-up", "layers": LAYERS, "heads": HEADS, "attending": [0, 2]}
    meta = {
        "title": "made up",
        "what": "profile",
        "model": model,
        "prompts": {"total": 0, "done": 0},
        "versions": {},
    }
    return RunWriter.start(tmp_path, {"seed": 0}, meta).finish()


def numbers(seed=0):
    values = np.random.default_rng(seed).random((2, HEADS, PROMPTS))
    values[1, 3] += 5
    return values


def test_numbers_become_a_section_with_intervals_and_a_headline(run):
    values = numbers()
    section = add(run, "doubt", values, "How far I doubt this head, in nats.", unit="nats")
    back = open_run(run.path).section("doubt")
    table = back.tables["heads"]
    assert list(table["name"]) == [f"L{layer}H{head}" for layer in (0, 2) for head in range(HEADS)]
    np.testing.assert_allclose(table["doubt"], values.mean(-1).ravel())
    units = values.reshape(-1, PROMPTS).T
    low, high = over_units(units, np.ones_like(units), seed=0)
    np.testing.assert_allclose(table["doubt_low"], low)
    np.testing.assert_allclose(table["doubt_high"], high)
    assert (table["n"] == PROMPTS).all()
    (told,) = back.headlines
    assert told.value == pytest.approx(values[1, 3].mean())
    assert told.text.startswith("Doubt is highest in L2H3: ")
    assert "not told apart" not in told.text
    assert told.baseline == pytest.approx(np.median(np.delete(values.mean(-1).ravel(), 8)))
    assert back.columns["doubt"] == "How far I doubt this head, in nats."
    assert section.title == back.title == "Doubt"
    problems = validate(open_run(run.path))
    assert not [one for one in problems if "sections" in one or "doubt" in one]


def test_the_highest_of_many_is_told_with_the_interval_of_the_highest(run):
    noise = np.random.default_rng(1).random((2, HEADS, PROMPTS))
    section = add(run, "noise", noise, "Noise.")
    (told,) = section.summary
    assert ", not told apart from L" in told
    assert " more; the median head has" in told
    near = add(run, "near", np.stack([noise[0] + 9, noise[1]]), "Five high ones.").summary[0]
    assert (
        ", not told apart from L0" in near
    )  # nor is the highest of 10 told apart from the other four
    assert "L2" not in near
    low, high = map(float, told.partition("[")[2].partition("]")[0].split(", "))
    row = section.tables["heads"].sort_values("noise").iloc[-1]
    assert low < row["noise_low"]
    assert high > row["noise_high"]
    assert add(run, "same", np.full((2, HEADS), 0.4), "The same.").summary == ()


def test_one_number_a_head_has_no_interval_and_replaces_what_was_added_before(run):
    add(run, "doubt", numbers(), "Doubt.")
    values = np.arange(10.0).reshape(2, HEADS)
    values[0, 0] = np.nan
    add(run, "doubt", values, "Doubt.", title="My doubts")
    back = open_run(run.path).section("doubt")
    assert back.title == "My doubts"
    assert back.tables["heads"]["doubt_low"].isna().all()
    assert np.isnan(back.tables["heads"]["doubt"][0])
    assert not back.headlines[0].is_sure


def test_numbers_may_be_given_by_head_and_the_others_are_not_known(run):
    mapping = {"L2H3": 0.5, "0.1": 2, (0, 4): 1.5}
    for values in (mapping, pd.Series({"L2H3": 0.5, "L0H1": 2, "L0H4": 1.5})):
        table = add(run, "doubt", values, "Doubt.").tables["heads"]
        known = table.dropna(subset=["doubt"]).set_index("name")["doubt"]
        assert known.to_dict() == {"L0H1": 2.0, "L0H4": 1.5, "L2H3": 0.5}
        assert len(table) == 2 * HEADS


@pytest.mark.parametrize(
    ("name", "values", "definition", "said"),
    [
        ("doubt", {"L1H0": 1.0}, "Doubt.", "there is no L1H0: the model has heads 0 to 4"),
        ("doubt", {"L0H5": 1.0}, "Doubt.", "there is no L0H5"),
        ("doubt", {"L0H1": "much"}, "Doubt.", r"values\['L0H1'\] must be a number, got 'much'"),
        (
            "doubt",
            np.zeros((3, HEADS)),
            "Doubt.",
            r"must be \[2 layers, 5 heads\].*got the shape \[3, 5\]",
        ),
        ("doubt", np.zeros(10), "Doubt.", r"got the shape \[10\]"),
        ("doubt", np.full((2, HEADS), np.nan), "Doubt.", "not all NaN"),
        ("doubt", np.full((2, HEADS), np.inf), "Doubt.", "finite numbers"),
        ("doubt", "words", "Doubt.", "must be numbers"),
        ("doubt", np.zeros((2, HEADS)), " ", "definition must say"),
        ("layer", np.zeros((2, HEADS)), "Doubt.", "what another column is called"),
        ("My doubt", np.zeros((2, HEADS)), "Doubt.", "small letters"),
    ],
)
def test_what_does_not_fit_is_refused(run, name, values, definition, said):
    with pytest.raises(LensError, match=said):
        add(run, name, values, definition)
    assert not open_run(run.path).sections


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": None}, "name must be a text, got None"),
        ({"definition": 5}, "definition must be a text, got 5"),
        ({"title": 5}, "title must be a text, got 5"),
        ({"unit": None}, "unit must be a text, got None"),
        ({"name": "a" * 65}, "name must have at most 64 letters, got 65"),
        ({"run": "folder"}, "run must be a Run"),
    ],
)
def test_what_is_no_text_is_refused_and_the_run_stays_whole(run, change, said):
    given = {"run": run, "name": "doubt", "values": np.zeros((2, HEADS)), "definition": "Doubt."}
    with pytest.raises(LensError, match=said):
        add(**(given | change))
    assert not open_run(run.path).sections


def test_numbers_are_replaced_through_the_same_run(run):
    for number in (1.0, 2.0, 3.0):
        add(run, "doubt", np.full((2, HEADS), number), "Doubt." + "!" * int(number))
    assert open_run(run.path).section("doubt").tables["heads"]["doubt"].tolist() == [3.0] * 10


def test_an_analysis_is_not_overwritten(run):
    lens.runs.sections.Section("roles", "Roles").save(run.path)
    with pytest.raises(LensError, match="has an analysis 'roles'; choose another name"):
        add(open_run(run.path), "roles", np.zeros((2, HEADS)), "Mine.")
