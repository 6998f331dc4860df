"""Sections of a run folder: what is saved is what is read, and damage is told."""

import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from lens.common.errors import LensError
from lens.figures.style import BARE, untemplated
from lens.runs.door import Door
from lens.runs.sections import Section, load_section, section_names

TABLE = pd.DataFrame({"head": ["L0H1", "L1H0"], "value": [0.25, np.nan]})
COLUMNS = {"head": "The head.", "value": "Its score."}


def section(**changes):
    values = {
        "name": "roles",
        "title": "What heads do",
        "summary": ("L0H1 does most.",),
        "limits": ("One prompt.",),
        "columns": COLUMNS,
        "configuration": {"seed": 3},
        "tables": {"scores": TABLE},
        "figures": {"grid": go.Figure(go.Scatter(x=[1, 2], y=[3, 5]), {"title": {"text": "A"}})},
    }
    return Section(**(values | changes))


def test_a_section_is_read_as_it_was_saved(tmp_path):
    saved = section()
    files = saved.save(tmp_path)
    assert sorted(files) == [
        "sections/roles/grid.json",
        "sections/roles/scores.parquet",
        "sections/roles/section.json",
    ]
    assert all((tmp_path / name).is_file() for name in files)
    read = load_section(Door(tmp_path), "roles")
    for name in ("name", "title", "summary", "limits", "columns", "configuration"):
        assert getattr(read, name) == getattr(saved, name)
    pd.testing.assert_frame_equal(read.tables["scores"], TABLE)
    assert read.figures["grid"].to_plotly_json() == saved.figures["grid"].to_plotly_json()


def test_a_section_prints_in_a_line():
    assert repr(section()) == (
        "<Section roles: What heads do; 1 sentences, 1 figures, tables: scores of 2 rows>"
    )


@pytest.mark.parametrize("template", ["plotly", "plotly_dark", "none"])
@pytest.mark.parametrize("usual", ["plotly", "simple_white", None])
def test_a_figure_keeps_its_template_whatever_the_reader_prefers(
    tmp_path, monkeypatch, template, usual
):
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, np.nan]), {"template": template})
    saved = section(figures={"grid": figure})
    saved.save(tmp_path)
    stored = json.loads((tmp_path / "sections/roles/grid.json").read_text())
    assert ("template" in stored["layout"]) == (template != "plotly")
    monkeypatch.setattr(pio.templates, "default", usual)
    read = load_section(Door(tmp_path), "roles").figures["grid"]
    assert json.loads(read.to_json()) == json.loads(figure.to_json())


def test_a_figure_made_without_a_template_is_stored_and_read_as_any_other(tmp_path):
    def made():
        return section(figures={"grid": go.Figure(go.Scatter(x=[1, 2], y=[3, np.nan]))})

    with untemplated():
        bare = made()
        assert bare.figures["grid"].layout.template.layout.meta == BARE
        bare.save(tmp_path)
        read = load_section(Door(tmp_path), "roles").figures["grid"]
        assert read.layout.template.layout.meta == BARE
    stored = json.loads((tmp_path / "sections/roles/grid.json").read_text())
    assert "template" not in stored["layout"]
    read = load_section(Door(tmp_path), "roles").figures["grid"]
    assert json.loads(read.to_json()) == json.loads(made().figures["grid"].to_json())


def test_a_section_without_its_index_is_not_there(tmp_path):
    section().save(tmp_path)
    section(name="later").save(tmp_path)
    assert section_names(tmp_path) == ["roles", "later"]
    (tmp_path / "sections/roles/section.json").unlink()
    assert section_names(tmp_path) == ["later"]
    with pytest.raises(LensError, match="no section 'roles'; it has: later"):
        load_section(Door(tmp_path), "roles")


@pytest.mark.parametrize("name", ["../up", "Roles", "a/b", ""])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(LensError, match="small letters, digits and underscores"):
        section(name=name)
    with pytest.raises(LensError, match="small letters, digits and underscores"):
        section(tables={name: TABLE})


def test_a_column_without_definition_is_refused():
    with pytest.raises(LensError, match="the columns value have no definition"):
        section(columns={"head": "The head."})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "section.json",
            '{"name": "roles"}',
            r"section\.json is damaged: title is missing; summary",
        ),
        ("scores.parquet", "no parquet", r"scores\.parquet: it is damaged: ArrowInvalid"),
        ("grid.json", "{", r"grid\.json cannot be read"),
        ("grid.json", '{"data": [{"type": "lines"}]}', r"grid\.json is no figure"),
    ],
)
def test_damage_is_told_with_what_to_do(tmp_path, file, content, message):
    section().save(tmp_path)
    (tmp_path / "sections" / "roles" / file).write_text(content)
    with pytest.raises(LensError, match=message) as caught:
        load_section(Door(tmp_path), "roles")
    assert re.search("again", str(caught.value))
