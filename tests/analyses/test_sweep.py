"""`lens sweep`: the plan, what fails, what is reused, and a killed one that ends with the same numbers."""

import json
import os
import re
import shutil
import signal
import tomllib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from lens_analyses.config import make_config
from lens_analyses.console import Output, UsageError
from lens_analyses.runner import Finished
from lens_analyses.sweeps import making
from lens_analyses.sweeps.headlines import headline, summary
from lens_analyses.sweeps.plan import make_runs, read_plan

from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.sections import Section

from .conftest import serious_violations, tables
from .test_interrupted import wait_for_prompts

SWEEP = """
title = "Two models <b>"
models = ["text-lm-3l", { name = "induction-2l", prompts = { copied = 2 } }]
analyses = ["profile", { what = "profile", seed = 3 }]
[settings]
prompts = { text_name = "moby-dick", tokens = 24, windows = 2, copied = 1, copied_length = 13 }
"""


def plan_of(text):
    return make_runs(tomllib.loads(text))


def _analysis(run):
    return (run.analysis.task, run.analysis.n) if run.analysis else (None, None)


def test_settings_that_all_analyses_share_go_to_those_that_have_them():
    heads, circuit = plan_of(
        """
        models = ["text-lm-3l"]
        analyses = ["heads", "circuit"]
        settings = { analysis = { n = 9, steps = 3, measures = "gradient" } }
        """
    )
    assert (heads.analysis.n, heads.analysis.measures) == (9, "gradient")
    assert (circuit.analysis.n, circuit.analysis.steps) == (9, 3)
    with pytest.raises(UsageError, match=r"analysis\.steps is a setting of lens circuit"):
        plan_of("models = ['o/a']\nanalyses = [{what = 'heads', analysis = {steps = 3}}]")


def test_every_model_gets_every_analysis_on_every_task():
    runs = plan_of(
        """
        models = ["o/a", { name = "o/b", dtype = "bfloat16", prompts = { copied = 7 } }]
        analyses = ["profile", { what = "circuit", tasks = ["ioi", "induction"], seed = 5 }]
        [settings]
        seed = 3
        capture = { block_size = 16 }
        analysis = { n = 9 }
        prompts = { text_name = "moby-dick", tokens = 31 }
        """
    )
    found = [(run.model.name, run.what, *_analysis(run), run.seed) for run in runs]
    each = [
        ("profile", None, None, 3),
        ("circuit", "ioi", 9, 5),
        ("circuit", "induction", 9, 5),
    ]
    assert found == [(model, *one) for model in ("o/a", "o/b") for one in each]
    assert {run.capture.block_size for run in runs} == {16}
    assert [run.prompts.copied for run in runs] == [4] * 3 + [7] * 3
    assert [run.prompts.text_name for run in runs] == ["moby-dick"] * 3 + [None] * 3
    assert [run.model.dtype for run in runs] == [None] * 3 + ["bfloat16"] * 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("modes = []", "unknown in a sweep file: modes; known: title, models"),
        ("models = ['o/a']", "needs a list analyses, got None"),
        ("models = 'o/a'", "needs a list models, got 'o/a'"),
        ("models = [3]\nanalyses = ['profile']", "models holds names or tables with name, got 3"),
        ("models = [{}]\nanalyses = ['profile']", "tables with name, got {}"),
        ("models = ['o/a']\nanalyses = ['hats']", "what must be one of profile, heads, .*'hats'"),
        ("models = ['o/a', 'o/a']\nanalyses = ['profile']", "has a run twice: lens run --model o/a"),
        ("models = ['o/a']\nanalyses = [{what = 'sinks', tasks = ['ioi']}]", "sinks has no task; tasks go with heads"),
        ("models = ['o/a']\nanalyses = [{what = 'heads', tasks = []}]", "tasks must be a list such as"),
        ("models = ['o/a']\nanalyses = [{what = 'heads', analysis = {m = 1}}]", "unknown setting analysis.m"),
        ("models = ['o/a']\nanalyses = ['heads']\nsettings = 3", "settings is a section, got 3"),
    ],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_says_why(text, reason):
    with pytest.raises(LensError, match=reason):
        plan_of(text)


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(LensError, match=r"no sweep file .*; e\.g\. models"):
        read_plan(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("models = [")
    with pytest.raises(LensError, match="cannot read the sweep file"):
        read_plan(broken)
    broken.write_text("title = 3\nmodels = ['o/a']\nanalyses = ['profile']")
    with pytest.raises(LensError, match="title must be a string, got 3"):
        read_plan(broken)


def test_the_name_of_a_sweep_follows_its_runs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("models = ['o/a']\nanalyses = ['profile']")
    name = read_plan(path).name
    assert re.fullmatch(r"mine-[0-9a-f]{8}", name)
    path.write_text("title = 'T'\nmodels = ['o/a']\nanalyses = ['profile']")
    assert read_plan(path).name == name
    path.write_text("models = ['o/b']\nanalyses = ['profile']")
    assert read_plan(path).name != name


@pytest.fixture(scope="module")
def swept(lens_command, tmp_path_factory):
    """A sweep of four runs, made once: its file, the folder of runs and the answer."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "small.toml").write_text(SWEEP)
    return folder, lens_command(
        "sweep", "-c", folder / "small.toml", "--out", folder / "runs", "--json"
    )


def test_a_sweep_makes_its_runs_and_a_page(swept):
    folder, answer = swept
    assert answer.code == 0, answer.err
    data = answer.json
    assert [run["model"] for run in data["runs"]] == ["text-lm-3l"] * 2 + ["induction-2l"] * 2
    assert len({run["run"] for run in data["runs"]}) == 4
    assert {(run["what"], run["task"]) for run in data["runs"]} == {("profile", None)}
    assert {(run["status"], run["error"]) for run in data["runs"]} == {("success", None)}
    assert all(run["computed"] for run in data["runs"])
    place = Path(data["folder"])
    assert json.loads((place / "sweep.json").read_text()) == data
    page = (place / "index.html").read_text()
    assert "Two models &lt;b&gt;" in page
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", page)
    for run in data["runs"]:
        report = place / run["report"]
        assert f'href="{run["report"]}"' in page
        assert report.resolve() == folder / "runs" / run["run"] / "report.html"
        assert json.loads(report.with_suffix(".json").read_text())["run"] == run["run"]


@pytest.mark.browser
def test_accessibility(swept, browser):
    assert serious_violations(browser, f"{swept[1].json['folder']}/index.html") == []


def test_the_headline_is_counted_from_the_scores(swept):
    folder, answer = swept
    first = answer.json["runs"][0]
    heads = pd.read_parquet(folder / "runs" / first["run"] / "heads.parquet")
    scores = heads.query("metric == 'induction' and variant == 'raw' and prompt_id == 'copied'")
    sure = scores["low"] > scores[["uniform", "random_weights"]].max(axis=1)
    assert first["headline"]["induction"] == ((scores["value"] > 0.3) & sure).sum() > 0
    prompts = pd.read_parquet(folder / "runs" / first["run"] / "prompts.parquet")
    text = prompts[prompts["kind"] == "text"]["loss"]
    assert first["headline"]["loss"] == pytest.approx(text.mean())
    assert (first["headline"]["heads"], first["headline"]["prompts"]) == (18, 3)
    assert answer.json["runs"][2]["headline"]["loss"] is None


def test_heads_are_those_of_the_layers_that_attend(run_folder):
    run = open_run(run_folder)
    hybrid = replace(run, meta={**run.meta, "model": {**run.meta["model"], "attending": [1]}})
    assert (headline(run)["heads"], headline(hybrid)["heads"]) == (18, 6)
    older = replace(run, meta={**run.meta, "model": {**run.meta["model"], "attending": None}})
    assert headline(older)["heads"] == 18


def test_a_number_of_pictures_for_all_analyses_is_of_labelled_ones():
    plan = """
        models = ["text-lm-3l"]
        analyses = ["heads", "vision"]
        [settings]
        analysis = { n = 9 }
        prompts = { images = "pictures" }
    """
    assert [run.value("analysis.n") for run in plan_of(plan)] == [9, 9]
    with pytest.raises(UsageError, match="each one of --image is taken"):
        plan_of(plan.replace('["heads", "vision"]', '["vision"]').replace("images", "image"))


def test_the_same_sweep_again_computes_nothing(swept, lens_command):
    folder, before = swept
    again = lens_command("sweep", "-c", folder / "small.toml", "--out", folder / "runs", "--json")
    assert again.code == 0
    assert not any(run["computed"] for run in again.json["runs"])
    assert [run["run"] for run in again.json["runs"]] == [run["run"] for run in before.json["runs"]]
    plan = lens_command("sweep", "-c", folder / "small.toml", "--out", folder / "runs", "--dry-run")
    assert plan.out.count("finished before") == 4
    assert "4 runs: 4 finished, 0 cannot be made" in plan.out


@pytest.fixture
def broken(tmp_path):
    """A folder without a model."""
    folder = tmp_path / "broken"
    folder.mkdir()
    return folder


def test_a_failure_is_shown_and_the_others_are_made(lens_command, tmp_path, broken):
    path = tmp_path / "some.toml"
    path.write_text(
        f'models = ["{broken}", "induction-2l"]\nanalyses = ["profile"]\nsettings.prompts.copied = 1'
    )
    planned = lens_command("sweep", "-c", path, "--out", tmp_path / "runs", "--dry-run", "--json")
    assert f"{broken} holds no model: config.json" in planned.json["runs"][0]["problem"]
    assert planned.json["runs"][1]["estimate"]["tokens"] > 10
    assert not (tmp_path / "runs").exists()
    answer = lens_command("sweep", "-c", path, "--out", tmp_path / "runs")
    assert answer.code == 3
    assert "1 of 2 runs are done" in answer.out
    assert (
        f"failed: lens run --model {broken} --copied 1: {broken} holds no model: config.json"
        in answer.out
    )
    (page,) = (tmp_path / "runs" / "sweeps").glob("*/index.html")
    assert f"{broken} holds no model: config.json" in page.read_text()
    assert "1 of 2 runs are done, 1 failed" in page.read_text()


def test_a_sweep_of_failures_only_is_an_error(lens_command, tmp_path, broken):
    path = tmp_path / "none.toml"
    path.write_text(f'models = ["{broken}"]\nanalyses = ["profile"]')
    assert lens_command("sweep", "-c", path, "--out", tmp_path / "runs").code == 1


def test_a_wrong_sweep_is_refused_whole(lens_command, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text('models = ["induction-2l", "no-such-model"]\nanalyses = ["profile"]')
    answer = lens_command("sweep", "-c", path, "--out", tmp_path / "runs")
    assert answer.code == 2
    assert answer.err.startswith("error: unknown model 'no-such-model'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_numbers_of_an_uninterrupted_one(
    spawn_lens, lens_command, tmp_path
):
    path = tmp_path / "killed.toml"
    path.write_text(
        'models = ["induction-2l"]\nanalyses = ["profile", { what = "profile", seed = 3 }]\n'
        "[settings]\nprompts = { copied = 5 }\ncapture = { keep_qk = false }\n"
    )
    out = tmp_path / "killed"
    process = spawn_lens("sweep", "-c", path, "--out", out)
    folder = wait_for_prompts(process, out, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (page,) = out.glob("sweeps/*/index.html")
    assert "This sweep is not complete" in page.read_text()
    assert json.loads((folder / "run.json").read_text())["status"] == "started"

    completed = lens_command("sweep", "-c", path, "--out", out, "--json")
    assert completed.code == 0, completed.err
    assert "of 5 prompts were finished before" in completed.err
    straight = lens_command("sweep", "-c", path, "--out", tmp_path / "straight", "--json")
    names = [[run["run"] for run in answer.json["runs"]] for answer in (completed, straight)]
    assert names[0] == names[1]
    for name in names[0]:
        both = (tables(out / name), tables(tmp_path / "straight" / name))
        for mine, theirs in zip(*both, strict=True):
            pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    headlines = [
        [run["headline"] for run in answer.json["runs"]] for answer in (completed, straight)
    ]
    assert headlines[0] == headlines[1]
    assert "This sweep is not complete" not in page.read_text()


def test_a_run_beside_that_is_not_whole_says_why_and_does_not_end_the_sweep(
    run_folder, tmp_path, monkeypatch
):
    whole = open_run(run_folder)
    failed = replace(
        whole, meta={**whole.meta, "status": "partial", "error": {"message": "too short"}}
    )
    monkeypatch.setattr(making, "execute", lambda *_, **__: Finished(whole, [], beside=(failed,)))
    item = making.Item(make_config({"model": {"name": "induction-2l"}}))
    made = making.make(item, tmp_path, Output(quiet=True), again=False)
    assert (made.status, made.error) == ("partial", "too short")


def test_the_first_sentence_of_each_analysis_is_shown(run_folder, tmp_path):
    copy = tmp_path / run_folder.name
    shutil.copytree(run_folder, copy)
    Section("roles", "Roles", summary=("Three heads copy.", "More.")).save(copy)
    Section("empty", "Empty").save(copy)
    assert summary(open_run(copy)) == ["Roles: Three heads copy."]


@pytest.mark.slow
@pytest.mark.timeout(
    900
)  # ray starts workers of its own, each of which imports everything: minutes on a busy machine
def test_a_run_whose_ray_worker_is_killed_is_made_again_from_where_it_was(
    spawn_lens, lens_command, tmp_path, broken
):
    pytest.importorskip("ray")
    path, out = tmp_path / "rayed.toml", tmp_path / "runs"
    path.write_text(
        f'models = ["induction-2l", "{broken}"]\nanalyses = ["profile"]\n'
        "[settings]\nprompts = { copied = 12 }\ncapture = { keep_qk = false }\n"
    )
    process = spawn_lens("sweep", "-c", path, "--out", out, "--engine", "ray", "--json")
    folder = wait_for_prompts(process, out, 2)
    worker = json.loads((folder / "run.json").read_text())["pid"]
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    said, heard = process.communicate()
    assert process.returncode == 3, heard
    made, failed = json.loads(said)["runs"]
    assert (made["status"], made["run"], made["error"]) == ("success", folder.name, None)
    assert json.loads((folder / "run.json").read_text())["pid"] != worker
    assert "of 12 prompts were finished before" in (folder / "log.txt").read_text()
    assert failed["status"] == "error"
    assert f"{broken} holds no model" in failed["error"]
    assert lens_command("validate", folder).code == 0
    (page,) = out.glob("sweeps/*/index.html")
    assert "--engine ray" in page.read_text()
