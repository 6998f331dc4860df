"""`lens export`: what comes out is what the run holds, and what cannot be written says why."""

import json
import re
import struct

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from lens_analyses.exporting import pictures
from lens_analyses.exporting.pictures import paper_figures

from lens.common.errors import LensError
from lens.figures.paper import for_paper
from lens.runs import open_run


def test_tables_come_out_as_they_are(lens_command, run_folder, tmp_path):
    run = open_run(run_folder)
    answer = lens_command("export", run_folder, "--format", "csv", "-o", tmp_path, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["files"] == ["heads.csv", "prompts.csv"]
    read = pd.read_csv(
        tmp_path / "heads.csv",
        keep_default_na=False,
        na_values={"value": [""], "low": [""], "high": [""]},
    )
    np.testing.assert_array_equal(read["value"], run.heads["value"])
    computed = run.heads["detail"].str.startswith(("=", "+", "-", "@"))  # tokens such as "-"
    assert computed.any()
    assert read["detail"][~computed].tolist() == run.heads["detail"][~computed].tolist()
    assert read["detail"][computed].tolist() == [f"'{one}" for one in run.heads["detail"][computed]]
    prompts = pd.read_csv(tmp_path / "prompts.csv")
    assert [json.loads(cell) for cell in prompts["token_ids"]] == [
        list(ids) for ids in run.prompts["token_ids"]
    ]
    assert [json.loads(cell) for cell in prompts["token_strings"]] == [
        list(s) for s in run.prompts["token_strings"]
    ]
    lens_command("export", run_folder, "-f", "parquet", "-o", tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "heads.parquet"), run.heads)


def test_a_headvis_tree_of_the_traces(lens_command, run_folder, tmp_path):
    place = tmp_path / "tree"
    answer = lens_command("export", run_folder, "-f", "headvis", "-o", place)
    assert answer.code == 0, answer.err
    config = json.loads((place / "config.json").read_text())
    assert (config["n_layers"], config["n_heads"]) == (3, 6)
    assert config["dataset_name"] == open_run(run_folder).title
    sequences = json.loads((place / "heads" / "L1H2.json").read_text())["sequences"]
    assert len(sequences) == 5
    again = lens_command("export", run_folder, "-f", "headvis", "-o", place)
    assert again.code == 1
    assert "exists" in again.err


def test_a_run_without_circuits_says_which_command_makes_one(lens_command, run_folder, tmp_path):
    answer = lens_command("export", run_folder, "-f", "graph", "-o", tmp_path / "g")
    assert answer.code == 1
    assert "has no circuit; `lens circuit` finds one" in answer.err


def test_circuits_are_copied_whole(lens_command, run_folder, tmp_path):
    run = tmp_path / "run"
    (run / "circuits" / "attribution-graph").mkdir(parents=True)
    for name in ("run.json", "config.toml"):
        (run / name).write_bytes((run_folder / name).read_bytes())
    (run / "circuits" / "ioi.json").write_text('{"edges": []}')
    (run / "circuits" / "attribution-graph" / "ioi.json").write_text('{"nodes": []}')
    answer = lens_command("export", run, "-f", "graph", "-o", tmp_path / "g", "--json")
    assert answer.json["files"] == ["attribution-graph/ioi.json", "ioi.json"]
    assert (tmp_path / "g" / "attribution-graph" / "ioi.json").read_text() == '{"nodes": []}'


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("-f hats", "format must be one of headvis, csv, parquet, graph, figures, got 'hats'"),
        ("-f figures --as svg,gif", "pictures are svg, pdf, png, got gif"),
        ("-f figures --width wide", "width must be single or double, got 'wide'"),
        ("-f figures --width=", "width must be single or double, got ''"),
        ("-f csv --as gif", "--as and --width are of figures, and csv has none"),
        ("-f headvis --width double", "--as and --width are of figures, and headvis has none"),
        ("-f csv --require-pictures", "--require-pictures goes with -f figures, not with -f csv"),
    ],
)
def test_what_is_not_there_is_refused(lens_command, run_folder, tmp_path, words, reason):
    answer = lens_command("export", run_folder, *words.split(), "-o", tmp_path / "x")
    assert answer.code == 2
    assert reason in answer.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("problem", ["kaleido", "browser"])
def test_without_a_browser_a_warning_says_what_to_install(
    lens_command, run_folder, tmp_path, monkeypatch, problem
):
    said = f"no picture can be drawn without {problem}: {pictures._INSTALL}"
    monkeypatch.setattr(pictures, "_browser_problem", lambda: said)
    answer = lens_command("export", run_folder, "-f", "figures", "-o", tmp_path / "x")
    assert answer.code == 0
    assert f"warning: {said}" in answer.out
    assert "attention-lens[export]" in answer.out
    required = lens_command(
        "export", run_folder, "-f", "figures", "-o", tmp_path / "x", "--require-pictures", "--json"
    )
    assert required.code == 1
    assert (required.json["files"], required.json["missing"]) == ([], said)


def test_files_of_an_earlier_export_are_not_told_as_drawn(run_folder, tmp_path, monkeypatch):
    every = paper_figures(open_run(run_folder))
    monkeypatch.setattr(pictures, "paper_figures", lambda run: {"a": every["sinks-by-layer"]})
    monkeypatch.setattr(pictures, "_browser_problem", lambda: "")
    for kind in ("svg", "png"):
        (tmp_path / f"a.{kind}").write_text("old")

    def fails(_, files, **__):
        files[0].write_text("drawn")
        raise RuntimeError("it went away")

    monkeypatch.setattr(pictures.pio, "write_images", fails)
    written = pictures.write_pictures(open_run(run_folder), tmp_path, ("svg", "png"), "single")
    assert written.files == ("a.svg",)
    assert "the browser failed (it went away)" in written.missing
    assert (tmp_path / "a.png").read_text() == "old"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    assert "without kaleido: install what draws pictures" in pictures._browser_problem()


@pytest.mark.browser
@pytest.mark.slow
def test_pictures_have_the_width_of_a_column(lens_command, run_folder, tmp_path, monkeypatch):
    if reason := pictures._browser_problem():
        pytest.skip(reason)
    every = paper_figures(open_run(run_folder))
    two = {name: every[name] for name in ("heads-induction-raw-copied", "sinks-by-layer")}
    monkeypatch.setattr(pictures, "paper_figures", lambda run: two)
    answer = lens_command("export", run_folder, "-f", "figures", "-o", tmp_path, "--json")
    assert answer.json["missing"] is None
    assert sorted(answer.json["files"]) == sorted(
        f"{name}.{kind}" for name in two for kind in ("svg", "pdf", "png")
    )
    svg = (tmp_path / "sinks-by-layer.svg").read_text()
    assert re.search(r'<svg[^>]* width="312"', svg)
    assert "<text" in svg
    sizes = {round(float(size), 2) for size in re.findall(r"font-size: ([\d.]+)px", svg)}
    assert sizes == {10.67}  # 8 pt
    box = re.search(rb"/MediaBox \[\s*0 0 ([\d.]+)", (tmp_path / "sinks-by-layer.pdf").read_bytes())
    assert box is not None
    assert float(box[1]) / 72 == pytest.approx(3.25, abs=0.02)
    header = (tmp_path / "sinks-by-layer.png").read_bytes()[16:20]
    assert struct.unpack(">I", header)[0] == pytest.approx(3.25 * 300, abs=2)


def test_figures_for_a_paper_keep_their_data():
    figure = go.Figure(
        [go.Scatter(x=[1, 2], y=[3, 4], marker={"size": 9}), go.Heatmap(z=[[1]])],
        layout={"title": {"text": "T"}},
    )
    double = for_paper(figure, width="double", ratio=0.25, points=9)
    assert (double.layout.width, double.layout.height) == (648, 162)
    assert double.layout.font.size == double.layout.xaxis.tickfont.size == 12
    assert double.layout.title.text == "T"
    assert (double.data[0].x, double.data[0].marker.size) == ((1, 2), 5)
    assert (figure.layout.width, figure.data[0].marker.size) == (None, 9)
    assert for_paper(figure, title=False).layout.title.text == ""
    long = for_paper(figure.update_layout(title={"text": "a few words &lt; " * 9}))
    lines = long.layout.title.text.split("<br>")
    assert " ".join(lines) == ("a few words &lt; " * 9).strip()
    assert len(lines) > 2
    assert long.layout.margin.t > double.layout.margin.t


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"width": "wide"}, "width must be single or double, got 'wide'"), ({"ratio": 0}, "must be positive, got 0 and 8"), ({"points": -1}, "and -1")],
)  # fmt: skip
def test_sizes_that_make_no_sense(given, reason):
    with pytest.raises(LensError, match=reason):
        for_paper(go.Figure(), **given)
