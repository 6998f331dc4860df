"""Runs that were killed, stopped or damaged: the same command completes them with the same numbers."""

import json
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from lens_analyses.steps import STEPS

from lens.runs import open_run

from .conftest import file_names, tables

TEXT = "--text-name moby-dick --tokens 40 --windows 4"
MANY = ["run", *TEXT.split(), "--copied", "2", "--no-keep-qk"]


def wait_for_prompts(process, out, count):
    """The run folder, once `count` prompts are done and more are to come."""
    while True:
        for meta in out.glob("*/run.json"):
            prompts = json.loads(meta.read_text())["prompts"]
            if prompts["done"] >= count:
                assert prompts["done"] < prompts["total"], "the run was too quick to be stopped"
                return meta.parent
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_is_partial_and_completed_with_the_same_numbers(
    spawn_lens, lens_command, tmp_path
):
    out = tmp_path / "killed"
    process = spawn_lens(*MANY, "--out", out)
    folder = wait_for_prompts(process, out, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    (listed,) = lens_command("list", out, "--json").json["runs"]
    assert (listed["id"], listed["status"]) == (folder.name, "partial")
    done = listed["prompts"]["done"]
    assert 2 <= done < 6
    assert lens_command("validate", folder).code == 3
    prompts = open_run(folder).prompts
    finished = list(prompts[prompts["status"] == "done"]["prompt_id"])
    reused = {
        name: (folder / "trace" / name / "trace.json").stat().st_mtime_ns for name in finished
    }

    completed = lens_command(*MANY, "--out", out, "--json")
    assert completed.code == 0, completed.err
    assert f"{done} of 6 prompts were finished before" in completed.err
    assert completed.json["path"] == str(folder)
    for name, written in reused.items():
        assert (folder / "trace" / name / "trace.json").stat().st_mtime_ns == written

    straight = lens_command(*MANY, "--out", tmp_path / "straight", "--json")
    for mine, theirs in zip(tables(folder), tables(straight.json["path"]), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    assert file_names(folder) == file_names(Path(straight.json["path"]))
    assert lens_command("validate", folder).code == 0


@pytest.mark.slow
def test_an_analysis_killed_in_the_middle_of_a_step_ends_with_the_same_numbers(
    spawn_lens, lens_command, tmp_path, monkeypatch
):
    """Of the steps behind it nothing is asked: they start anew in any case."""
    heads = (
        "heads --model induction-2l --copied 3 --n 24 --measures ablation/mean,ablation/resample"
    )
    process = spawn_lens(*heads.split(), "--out", tmp_path / "killed")
    while not list(tmp_path.glob("killed/*/work/*.npz")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = (tmp_path / "killed").iterdir()
    assert open_run(folder).sections == ["roles"]

    begun = tuple(step for step in STEPS["heads"] if step.name in ("roles", "importance"))
    monkeypatch.setitem(STEPS, "heads", begun)
    completed = lens_command(*heads.split(), "--out", tmp_path / "killed", "--json")
    assert completed.code == 0, completed.err
    assert "roles was finished before" in completed.err
    straight = lens_command(*heads.split(), "--out", tmp_path / "straight", "--json")
    mine, theirs = open_run(folder), open_run(straight.json["path"])
    assert mine.sections == theirs.sections == ["roles", "importance"]
    for name in mine.sections:
        expected = theirs.section(name)
        assert mine.section(name).summary == expected.summary
        for table, values in mine.section(name).tables.items():
            pd.testing.assert_frame_equal(values, expected.tables[table], check_exact=True)
    assert file_names(folder) == file_names(theirs.path)


@pytest.mark.slow
def test_a_stopped_run_says_how_to_go_on(spawn_lens, lens_command, tmp_path):
    process = spawn_lens(*MANY, "--out", tmp_path)
    folder = wait_for_prompts(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 3
    assert "of 6 prompts; the same command" in said
    assert f"lens run -c {folder / 'config.toml'}" in said
    assert open_run(folder).meta["status"] == "partial"
    assert "stopped" in (folder / "log.txt").read_text()
    assert lens_command("list", tmp_path).out.count("partial") == 1
    answer = lens_command("report", folder)
    assert answer.code == 1
    assert "heads.parquet is missing: the run is partial" in answer.err


def test_a_damaged_trace_is_captured_again(lens_command, tmp_path):
    arguments = ["run", "--model", "induction-2l", "--copied", "3", "--out", tmp_path, "--json"]
    folder = Path(lens_command(*arguments).json["path"])
    expected = tables(folder)
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**meta, "status": "partial"}))
    (folder / "trace" / "p001" / "layer-01.safetensors").write_bytes(b"broken")
    answer = lens_command(*arguments)
    assert answer.code == 0, answer.err
    assert "p001 is captured again" in answer.err
    assert "2 of 3 prompts were finished before" in answer.err
    for mine, theirs in zip(tables(folder), expected, strict=True):
        pd.testing.assert_frame_equal(mine, theirs)
