"""`lens compare`: the page and the JSON say what `compare_runs` found."""

import json
import re
import shutil
from pathlib import Path

import pytest
from lens_analyses.comparison.page import largest

from lens.runs import compare_runs, compare_series, open_run
from lens.runs.comparison.headlines import of_comparison
from tests.benchmarks import sink_checkpoints

from .conftest import ARGUMENTS, serious_violations


@pytest.fixture(scope="module")
def other_folder(lens_command, tmp_path_factory) -> Path:
    """The run of `run_folder` in half the precision."""
    out = tmp_path_factory.mktemp("other")
    answer = lens_command(*ARGUMENTS, "--dtype", "bfloat16", "--out", out, "--json")
    assert answer.code == 0, answer.err
    return Path(answer.json["path"])


@pytest.fixture(scope="module")
def compared(lens_command, run_folder, other_folder, tmp_path_factory):
    """Where the comparison lies, and what the command said."""
    out = tmp_path_factory.mktemp("comparison")
    return out, lens_command("compare", run_folder, other_folder, "-o", out, "--json")


def test_the_json_holds_the_comparison(compared, run_folder, other_folder):
    out, answer = compared
    assert answer.code == 0, answer.err
    data = json.loads((out / "comparison.json").read_text())
    expected = compare_runs(open_run(run_folder), open_run(other_folder))
    assert (data["schema"], data["schema_version"]) == ("attention-lens/comparison", 1)
    assert (data["a"]["run"], data["b"]["run"]) == (run_folder.name, other_folder.name)
    assert data["summary"] == answer.json["summary"] == list(expected.sentences)
    shown = [one.headline.text for one in of_comparison(expected)]
    assert [one["text"] for one in data["headlines"]] == shown
    page = (out / "comparison.html").read_text()
    assert page.count('<li>\n    <div class="told">') == len(shown) <= 5
    assert data["shared"] == {"text": 3, "copied": 2}
    assert data["limits"] == list(expected.limits)
    assert len(data["heads"]) == len(expected.heads)
    for row, wanted in zip(data["heads"], expected.heads.to_dict("records"), strict=True):
        assert row == {name: None if value != value else value for name, value in wanted.items()}
    assert [row["setting"] for row in data["settings"]] == ["model.dtype"]
    columns = [*data["metrics"][0], *data["heads"][0], *data["settings"][0], *data["losses"][0]]
    assert set(columns) <= set(data["definitions"])
    assert f"{run_folder} {other_folder}" in data["provenance"]["command"]


def test_the_page_asks_for_nothing(compared):
    page = (compared[0] / "comparison.html").read_text()
    assert "default-src 'none'" in page
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.partition("<script>")[0])
    assert not [tag for tag in tags if "src=" in tag or "href=" in tag]


@pytest.mark.browser
def test_the_page_draws_the_score_that_is_chosen(compared, browser):
    out, _ = compared
    data = json.loads((out / "comparison.json").read_text())
    tab = browser.new_page()
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(f"file://{out / 'comparison.html'}")
    tab.wait_for_selector("#grid .heatmaplayer")
    tab.locator("#score").select_option("text/entropy/raw")
    drawn = "document.getElementById('grid')._fullData[0].z"
    flat = tab.evaluate(f"Array.from({drawn}, row => Array.from(row)).flat()")
    wanted = [
        row["difference"]
        for row in data["heads"]
        if (row["prompts"], row["metric"], row["variant"]) == ("text", "entropy", "raw")
    ]
    assert flat == pytest.approx(wanted)
    assert "ln P" in tab.locator("#score-definition").inner_text()
    tab.close()
    assert problems == []


@pytest.mark.browser
def test_accessibility(compared, browser):
    assert serious_violations(browser, compared[0] / "comparison.html", "#grid .main-svg") == []


def test_models_of_other_shapes_are_compared_by_means(lens_command, run_folder, tmp_path):
    made = lens_command(
        "run", "--model", "induction-2l", "--copied", "2", "--out", tmp_path, "--json"
    )
    answer = lens_command("compare", run_folder, made.json["path"], "-o", tmp_path / "c")
    assert answer.code == 0, answer.err
    assert (
        "text-lm-3l has 3 layers of 6 heads and induction-2l has 2 layers of 4 heads" in answer.out
    )
    page = (tmp_path / "c" / "comparison.html").read_text()
    assert "Heads are not compared one by one" in page
    assert 'id="score"' not in page


def test_the_same_run_twice_is_refused(lens_command, run_folder, tmp_path):
    answer = lens_command("compare", run_folder, run_folder, "-o", tmp_path / "c")
    assert answer.code == 1
    assert "A and B are the same run" in answer.err
    assert not (tmp_path / "c").exists()


def test_a_series_of_runs_is_one_page(lens_command, run_folder, other_folder, tmp_path, browser):
    third = tmp_path / "third"
    shutil.copytree(run_folder, third)
    index = json.loads((third / "run.json").read_text())
    (third / "run.json").write_text(json.dumps(index | {"id": "third"}))
    (third / "manifest.json").unlink()
    answer = lens_command("compare", run_folder, other_folder, third, "-o", tmp_path, "--json")
    assert answer.code == 0, answer.err
    data = json.loads((tmp_path / "series.json").read_text())
    assert [one["run"] for one in data["runs"]] == [run_folder.name, other_folder.name, "third"]
    assert data["summary"] == answer.json["summary"]
    series = compare_series([open_run(run_folder), open_run(other_folder), open_run(third)])
    assert len(data["heads"]) == len(series.heads)
    assert data["summary"][0].startswith("Induction heads: 3 at ")
    back = [row for row in data["heads"] if row["place"] == 2 and row["since_first"] is not None]
    assert {row["since_first"] for row in back} == {0.0}
    page = tmp_path / "series.html"
    assert not serious_violations(browser, page)
    tab = browser.new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(f"file://{page}")
    tab.wait_for_selector("#scatter .main-svg")
    tab.select_option("#score", "text/previous_token/raw")
    tab.wait_for_selector("#scatter .main-svg")
    assert said == []
    tab.close()


def test_a_sink_emerges_over_the_checkpoints_of_a_training(lens_command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(sink_checkpoints.texts(16, seed=1)))
    runs = []
    for _, folder in sink_checkpoints.checkpoints((0, 25, 50), tmp_path):
        words = ["run", "--model", folder, "--prompts", prompts, "--copied", "0"]
        answer = lens_command(*words, "--out", tmp_path / "runs", "--json")
        assert answer.code == 0, answer.err
        runs.append(answer.json["path"])
    answer = lens_command("compare", *runs, "-o", tmp_path, "--json")
    assert answer.code == 0, answer.err
    sinks = json.loads((tmp_path / "series.json").read_text())["sinks"]
    assert [row["run"] for row in sinks] == ["step-0", "step-25", "step-50"]
    assert sinks[0]["mass"] == pytest.approx(sinks[0]["uniform"], abs=0.01)
    assert sinks[2]["mass_low"] > 1.5 * sinks[2]["uniform"]
    said = " ".join(answer.json["summary"])
    assert ", for the first time at step-50" in said
    assert 'id="first-token"' in (tmp_path / "series.html").read_text(encoding="utf-8")


def test_what_differs_most_is_told_first_and_what_has_no_interval_last():
    """The same of a pair and of a series, which calls its columns otherwise."""
    rows = [
        {"metric": metric, "d": value, "d_low": low, "d_high": high}
        for metric, value, low, high in (
            ("sink_mass", 0.9, None, None),
            ("sink_mass", -0.2, -0.3, -0.1),
            ("sink_mass", 0.3, 0.2, 0.4),
            ("sink_mass", 0.4, -0.1, 0.9),
            ("sink_mass", None, None, None),
            ("entropy", 0.8, 0.7, 0.9),
        )
    ]
    assert [row["d"] for row in largest(rows, "d", "d_low", "d_high", 9)] == [0.3, -0.2, 0.9]
    assert len(largest(rows, "d", "d_low", "d_high", 2)) == 2
