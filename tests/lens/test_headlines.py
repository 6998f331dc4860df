"""Headlines: how surprising a finding is, which stand, which come first, and that a run folder keeps them."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from lens.common.errors import LensError
from lens.figures.columns import column_grid
from lens.figures.small import small, strip
from lens.runs.door import Door
from lens.runs.first_screen import MOST, OF_ONE, PROFILE, first, first_screen
from lens.runs.headlines import Headline, highest, is_above_nothing
from lens.runs.sections import Section, load_section

NAN = math.nan
ONE = Headline("one", 0.92, 0.89, 0.94, 0.03, "uniform attention")


@pytest.mark.parametrize(
    ("value", "low", "high", "baseline", "spread", "surprise"),
    [
        (0.92, 0.89, 0.94, 0.03, NAN, 0.86 / 0.03),  # an exact baseline: its size is the scale
        (5.0, 4.0, 6.0, 1.0, 0.5, 6.0),  # one that scatters: its spread is
        (1.0, 0.5, 1.5, 3.0, 0.5, 3.0),  # below the baseline the high end is the nearer
        (0.2, 0.1, 0.3, 0.1, 0.5, 0.0),  # the interval holds the baseline
        (0.2, -0.1, 0.3, 0.0, 0.0, 0.0),
        (0.5, 0.4, 0.6, 0.0, NAN, 80.0),  # at least 1 % of the value
        (1.0, 0.7, 1.3, 0.5, 0.002, 20.0),  # also where the baseline scatters less than that
        (0.5, 0.5, 0.5, -0.5, 0.0, 100.0),  # and no more than 100
        (0.5, NAN, NAN, 0.1, NAN, 4.0),  # no interval: the value itself
        (0.87, 0.85, 0.89, 0.95, NAN, 1.2),  # of a share its distance to the nearer end
        (0.94, 0.93, 0.95, 1.0, NAN, 0.05 / 0.0094),
    ],
)
def test_how_surprising_a_finding_is(value, low, high, baseline, spread, surprise):
    one = Headline("x", value, low, high, baseline, "chance", spread=spread)
    assert one.surprise == pytest.approx(surprise)


def test_the_highest_of_many_beside_the_others():
    values = np.array([0.1, 0.3, 9.0, 0.2, np.nan, 0.4])
    number, fields = highest(values, values - 1, values + 1)
    others = np.array([0.1, 0.3, 0.2, 0.4])
    median = float(np.median(others))
    assert (number, fields["value"], fields["low"], fields["high"]) == (2, 9.0, 8.0, 10.0)
    assert fields["baseline"] == pytest.approx(median)
    assert fields["spread"] == pytest.approx(1.4826 * np.median(np.abs(others - median)))
    assert highest([0.0, 0.0, 3.0], [0, 0, 2], [0, 0, 4])[1]["spread"] == 1.0
    assert highest([6e-8, 6e-8, 0.1], [0, 0, 0], [1, 1, 1])[1]["baseline"] == 0
    assert highest([6e-8, 6e-8, 1e-3], [0, 0, 0], [1, 1, 1])[1]["baseline"] == 6e-8
    with pytest.raises(LensError, match="no others to be compared with"):
        highest([np.nan, 1.0], [0, 0], [1, 2])


def test_the_highest_of_many_needs_more_than_one_value_does():
    """Three standard errors above an exact 0.1 are chance for the highest of 300 heads, and not for one."""
    one = Headline("x", 0.13, 0.1104, 0.1496, 0.1, "chance")
    assert one.stands
    assert not replace(one, many=300).stands
    assert replace(one, low=0.128, high=0.132, many=300).stands
    assert replace(one, low=NAN, high=NAN, many=300).surprise == pytest.approx(0.3)


def test_of_heads_that_do_nothing_none_is_told():
    """In 300 runs of 24 heads that scatter around 0."""
    random = np.random.default_rng(1)
    told = 0
    for _ in range(300):
        values = random.normal(size=24)
        _, fields = highest(values, values - 1.96, values + 1.96)
        told += is_above_nothing(fields) and Headline("x", **fields, against="median").stands
    assert told < 300 / 20


def test_what_is_no_headline_is_refused():
    with pytest.raises(LensError, match="a value and a baseline that are numbers"):
        replace(ONE, baseline=NAN)
    with pytest.raises(LensError, match="low must not be above high"):
        replace(ONE, low=2.0)
    with pytest.raises(LensError, match="shows the figure 'grid', which it lacks; it has: none"):
        Section("found", "Found", headlines=(replace(ONE, figure="grid"),))


def section(name, *headlines):
    return Section(name, name, figures={"grid": go.Figure()}, headlines=headlines)


def test_the_most_surprising_come_first_and_no_section_fills_the_screen():
    by_size = [replace(ONE, text=str(size), spread=1 / size) for size in range(1, 6)]
    unsure = replace(ONE, text="unsure", low=NAN, high=NAN)
    held = replace(ONE, text="held", baseline=0.9)
    found = first([section("a", *by_size), section("b", unsure), section("c", held, ONE)])
    assert [(part.name, one.text) for part, one in found] == [
        ("c", "one"),
        ("a", "5"),
        ("a", "4"),
        ("b", "unsure"),
    ]
    many = [section(f"s{number}", *by_size) for number in range(4)]
    assert len(first(many)) == MOST == 5
    assert OF_ONE == 2
    assert first(many, 0) == []


def test_a_section_keeps_its_headlines_and_leaves_out_what_chance_explains(tmp_path):
    unsure = Headline("unsure", 0.5, NAN, NAN, 0.1, "chance", 0.2, "nats", "grid")
    held = replace(ONE, text="held", baseline=0.9)
    made = section("found", ONE, held, unsure)
    assert made.headlines == (ONE, unsure)
    made.save(tmp_path)
    back = load_section(Door(tmp_path), "found").headlines
    assert back[0].as_json() == ONE.as_json()
    assert back[1].as_json() == unsure.as_json()
    assert not back[1].is_sure


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low": 3.0}, "low 3.0 is above high 0.94"),
        ({"value": None}, "value"),
        ({"spread": -1.0}, "spread"),
    ],
)
def test_a_damaged_headline_is_told(tmp_path, change, said):
    section("found", ONE).save(tmp_path)
    path = tmp_path / "sections" / "found" / "section.json"
    index = json.loads(path.read_text())
    index["headlines"][0] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(LensError, match=said):
        load_section(Door(tmp_path), "found")


def test_a_section_of_an_older_version_still_shows(tmp_path):
    section("found", ONE).save(tmp_path)
    path = tmp_path / "sections" / "found" / "section.json"
    index = json.loads(path.read_text())
    del index["headlines"]
    path.write_text(json.dumps(index))
    assert load_section(Door(tmp_path), "found").headlines == ()


def heads(value=0.8, low=0.7):
    rows = [
        ("copied", 0, head, "induction", "raw", score, end, score + 0.05, 1, "", 0.05, 0.04)
        for head, (score, end) in enumerate([(0.1, 0.05), (value, low)])
    ]
    columns = ["prompt_id", "layer", "head", "metric", "variant", "value", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "n", "detail", "uniform", "random_weights"])


def test_the_profile_fills_what_sections_leave_and_says_its_baseline():
    alone = first_screen(heads(), {})
    assert [one.section for one in alone] == [PROFILE]
    told = alone[0].headline
    assert (
        "1 induction head (of 2 heads), most L0H1 0.80 [0.70, 0.85], against 0.05 with uniform"
        in told.text
    )
    assert (told.baseline, told.against) == (0.05, "uniform attention")
    assert alone[0].picture is not None
    many = {name: section(name, ONE, ONE) for name in ("a", "b", "c")}
    assert PROFILE not in [one.section for one in first_screen(heads(), many)]
    assert [one.section for one in first_screen(heads(), {"a": many["a"]})] == ["a", "a", PROFILE]
    assert first_screen(heads(), {"roles": section("roles")}) == []
    assert first_screen(heads(value=0.2), {}) == []


def test_all_that_is_lost_of_all_there_was_surprises_most():
    """From a share of 1 there is no way up, and of 0 no hundredth: neither is a scale."""
    lost = Headline("Recall is 0, and 1 without others.", 0.0, 0.0, 0.0, 1.0, "random heads")
    assert (lost.surprise, lost.stands) == (100.0, True)
    assert replace(lost, value=1.0, low=1.0, high=1.0).surprise == 0.0
    exact = replace(lost, spread=0.0, baseline=-3.0)
    assert exact.surprise == 100.0


@pytest.mark.parametrize(("layers", "step"), [(3, 1), (30, 5), (80, 12)])
def test_the_layers_of_a_small_picture_have_room_for_their_names(layers, step):
    rows = [(layer, head, float(layer)) for layer in range(layers) for head in range(2)]
    figure = column_grid(pd.DataFrame(rows, columns=["layer", "head", "a"]), "a")
    read = go.Figure(figure.to_plotly_json())  # as from a file
    assert [small(one).layout.yaxis.dtick for one in (figure, read)] == [step, step]


def test_a_small_picture_has_no_words_and_leaves_the_figure_as_it_is():
    figure = go.Figure(
        go.Heatmap(z=[[1, 2]], x=["a long name", "b"], texttemplate="%{z}"),
        {"title": {"text": "t"}, "annotations": [{"text": "L0H1"}]},
    )
    made = small(figure)
    assert made.data[0].showscale is False
    assert made.data[0].texttemplate is None
    assert made.layout.title.text is None
    assert not made.layout.annotations
    assert made.layout.xaxis.showticklabels is False
    assert figure.layout.title.text == "t"
    assert figure.data[0].texttemplate == "%{z}"
    numbers = go.Figure(go.Scatter(x=np.arange(3), y=[1, 2, 3]))
    read = go.Figure(numbers.to_plotly_json())  # as from a file
    assert small(numbers).layout.xaxis.showticklabels is None
    assert small(read).layout.xaxis.showticklabels is None
    other = small(go.Figure(layout={"template": {"layout": {"colorway": ["red"]}}}))
    assert other.layout.template.layout.colorway == ("red",)
    assert made.layout.template == figure.layout.template


def test_names_of_rows_have_room_beside_a_small_picture():
    heads = [f"L{layer}H{head}" for layer in range(20) for head in range(9)]
    ticks = go.Figure(go.Heatmap(z=[[1.0]] * 180))
    ticks.update_yaxes(tickvals=[*range(180)], ticktext=heads)
    drawn = [
        go.Figure(go.Heatmap(z=[[1.0]] * len(rows), y=rows))
        for rows in (["L0"], heads, ["a name of forty letters, told to its end"])
    ]
    layouts: list[Any] = [small(figure).layout for figure in (*drawn, ticks)]
    narrow, wide, longest, by_ticks = (layout.margin.l for layout in layouts)
    assert narrow < wide == by_ticks < longest < layouts[0].width / 2


def test_the_strip_puts_value_interval_and_baseline_on_one_line():
    drawn = strip(3.0, 2.0, 5.0, 1.0, "<chance>")
    assert 'x1="6.0" x2="6.0"' in drawn  # the baseline, the least
    assert 'x1="78.0" x2="294.0"' in drawn  # the interval: a quarter of the way, to the end
    assert 'cx="150.0"' in drawn
    assert "1 &lt;chance&gt;" in drawn
    assert strip(3.0, NAN, NAN, 1.0, "chance").count("<line") == 2
    same = strip(1.0, 0.5, 1.5, 1.0, "chance")
    assert "1 chance<" in same
    assert ">1<" in same
