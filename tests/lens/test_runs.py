"""Run folders: statuses, damage, resuming, atomic files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens.common.errors import LensError
from lens.common.files import open_regular, write_json, write_text
from lens.runs import BrokenRun, find_run, list_runs, open_run
from lens.runs.writer import RunWriter, config_hash, find_by_config
from lens.traces.profiles import COLUMNS
from tests.lens.made_runs import meta

ABSENT = object()
CONFIG = {"model": {"name": "text-lm-3l"}, "seed": 0}
META = meta()


def tables():
    """The smallest tables that a reader takes: one prompt of three tokens, one score of 2 x 3 heads."""
    prompts = pd.DataFrame(
        {
            "prompt_id": ["p000"],
            "kind": "text",
            "title": "t",
            "text": "abc",
            "tokens": 3,
            "token_ids": [[0, 1, 2]],
            "token_strings": [["a", "b", "c"]],
            "loss": 1.0,
            "loss_repeat": np.nan,
            "status": "done",
            "seconds": 0.1,
        }
    )
    heads = pd.DataFrame(
        [(layer, head) for layer in range(2) for head in range(3)], columns=["layer", "head"]
    )
    scores = {
        "prompt_id": "p000",
        "metric": "induction",
        "variant": "raw",
        "value": 0.5,
        "n": 1,
        "detail": "",
    }
    heads = heads.assign(**scores).reindex(columns=list(COLUMNS))
    return {"prompts": prompts, "heads": heads.astype({"low": float, "high": float})}


def finished(runs, config=CONFIG):
    writer = RunWriter.start(runs, config, META)
    for name, table in tables().items():
        writer.table(name, table)
    return writer.finish()


def test_a_finished_run_reads_back(tmp_path):
    run = finished(tmp_path)
    assert run.id.endswith(f"-text-lm-3l-profile-{config_hash(CONFIG)}")
    assert (run.status, run.title) == ("success", META["title"])
    assert run.config == CONFIG
    assert run.heads["value"].tolist() == [0.5] * 6
    assert run.prompts["tokens"].tolist() == [3]
    assert set(run.meta["files"]) == {"config.toml", "prompts.parquet", "heads.parquet"}
    for name, size in run.meta["files"].items():
        assert (run.path / name).stat().st_size == size
    assert "success, text-lm-3l, 0 of 2 prompts" in repr(run)


def test_a_run_whose_process_is_gone_is_partial(tmp_path):
    writer = RunWriter.start(tmp_path, CONFIG, META)
    assert open_run(writer.path).status == "started"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    writer.update(pid=process.pid)
    assert open_run(writer.path).status == "partial"
    writer.update(pid="?")
    assert open_run(writer.path).status == "partial"


def test_a_process_of_the_same_number_is_not_the_one(tmp_path):
    writer = RunWriter.start(tmp_path, CONFIG, META)
    writer.update(process_started=writer.meta["process_started"] + 1)
    assert open_run(writer.path).status == "partial"
    writer.update(process_started=None)  # a machine without /proc
    assert open_run(writer.path).status == "started"


def test_a_run_on_another_machine_goes_on_until_it_is_silent_for_a_day(tmp_path):
    writer = RunWriter.start(tmp_path, CONFIG, META)
    writer.update(pid=2**22 + 1, host="elsewhere")
    assert open_run(writer.path).status == "started"
    for updated in ("2020-01-01T00:00:00+00:00", "2020-01-01T00:00:00", "?", None):
        write_json(writer.path / "run.json", {**writer.meta, "updated": updated})
        assert open_run(writer.path).status == "partial"


def test_the_same_configuration_resumes_its_own_folder(tmp_path):
    first = RunWriter.start(tmp_path, CONFIG, META)
    first.text("log.txt", "one")
    first.update(pid=None, seconds=5.0)
    stored = json.loads((first.path / "run.json").read_text())
    write_json(first.path / "run.json", {**stored, "seconds": 5.0})
    (first.path / ".heads.parquet.x1y2z3a4.lens-part").write_text("half")
    (first.path / ".gitignore").write_text("mine")
    second = RunWriter.start(tmp_path, CONFIG, META)
    assert second.path == first.path
    assert second.resumed
    assert second.meta["created"] == stored["created"]
    assert second.meta["seconds"] >= 5.0
    assert "log.txt" in second.meta["files"]
    assert not (first.path / ".heads.parquet.x1y2z3a4.lens-part").exists()
    assert (first.path / ".gitignore").exists()
    other = RunWriter.start(tmp_path, {**CONFIG, "seed": 1}, META)
    assert other.path != first.path
    assert not other.resumed


def test_again_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    run = finished(tmp_path)
    (run.path / "trace/p000").mkdir(parents=True)
    for name in ("trace/p000/layer-00.safetensors", "trace/p000/notes.txt", "mine.parquet"):
        (run.path / name).write_text(name)
    backup = tmp_path / f"2020-01-01-copy-of-{run.id}"
    shutil.copytree(run.path, backup)
    kept = {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    assert find_by_config(tmp_path, CONFIG) == run.path
    writer = RunWriter.start(tmp_path, CONFIG, META, again=True)
    assert (writer.path, writer.resumed) == (run.path, False)
    left = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
    assert left == {"run.json", "config.toml", "trace/p000/notes.txt", "mine.parquet"}
    assert set(writer.meta["files"]) == {"config.toml"}
    assert {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()} == kept


def test_a_folder_of_notes_with_the_same_ending_is_no_run(tmp_path):
    notes = tmp_path / f"2026-01-01-notes-{config_hash(CONFIG)}"
    notes.mkdir()
    (notes / "config.toml").write_text("mine")
    assert find_by_config(tmp_path, CONFIG) is None
    assert RunWriter.start(tmp_path, CONFIG, META).path != notes
    assert (notes / "config.toml").read_text() == "mine"


def test_again_never_follows_a_name_out_of_the_folder(tmp_path):
    run = finished(tmp_path / "runs")
    for name in ("outside.txt", "elsewhere/file.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (run.path / "link").symlink_to(tmp_path / "elsewhere")
    named = dict.fromkeys(("../../outside.txt", "link/file.txt", str(tmp_path / "outside.txt")), 4)
    write_json(run.path / "run.json", {**run.meta, "files": {**run.meta["files"], **named}})
    RunWriter.start(tmp_path / "runs", CONFIG, META, again=True)
    assert (tmp_path / "outside.txt").exists()
    assert (tmp_path / "elsewhere/file.txt").exists()


def test_a_run_that_is_being_written_is_left_alone(tmp_path):
    writer = RunWriter.start(tmp_path, CONFIG, META)
    writer.update(pid=os.getppid(), process_started=None)
    with pytest.raises(LensError, match=r"is writing .* right now"):
        RunWriter.start(tmp_path, CONFIG, META)


def test_warnings_are_kept_once(tmp_path):
    writer = RunWriter.start(tmp_path, CONFIG, META)
    writer.warn("slow")
    writer.warn("slow")
    assert open_run(writer.path).meta["warnings"] == ["slow"]
    run = writer.finish("error", ValueError("no"))
    assert run.meta["error"] == {"type": "ValueError", "message": "no"}


def test_the_list_survives_a_broken_run(tmp_path):
    good = finished(tmp_path)
    bad = tmp_path / "broken"
    bad.mkdir()
    (bad / "run.json").write_text("{")
    (tmp_path / "not-a-run").mkdir()
    found = {run.id: run for run in list_runs(tmp_path)}
    assert set(found) == {good.id, "broken"}
    assert isinstance(found["broken"], BrokenRun)
    assert found["broken"].status == "error"
    assert "cannot be read" in found["broken"].problem


def test_ids_are_looked_up_and_never_joined(tmp_path):
    run = finished(tmp_path / "runs")
    finished(tmp_path / "outside", {"seed": 2})
    assert find_run(tmp_path / "runs", run.id).path == run.path
    for hostile in ("../outside", "", ".", "/etc", f"{run.id}/.."):
        with pytest.raises(LensError, match="there is no run"):
            find_run(tmp_path / "runs", hostile)
    with pytest.raises(LensError, match=r"has no trace of prompt '\.\./p000'"):
        run.trace("../p000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"version 2, .* reads .* version 1; .* attention-lens 0\.1\.0"),
        ({"schema": "other"}, "has schema 'other'"),
        ({"status": "great"}, r"status should be 'started', .* got 'great'"),
        ({"model": None}, "model should be a valid dictionary.*got None"),
        ({"title": 3}, "title should be a valid string, got 3"),
        ({"files": []}, r"files should be a valid dictionary, got \[\]"),
        ({"model": {}}, "model.name is missing"),
        (
            {"prompts": {"done": None, "total": 2}},
            "prompts.done should be a valid integer, got None",
        ),
        ({"versions": ABSENT, "what": ABSENT}, "what is missing; versions is missing"),
    ],
)
def test_what_the_schema_does_not_allow_is_refused_and_listed(tmp_path, change, message):
    run = finished(tmp_path)
    meta = {key: value for key, value in {**run.meta, **change}.items() if value is not ABSENT}
    write_json(run.path / "run.json", meta)
    with pytest.raises(LensError, match=message):
        open_run(run.path)
    [listed] = list_runs(tmp_path)
    assert isinstance(listed, BrokenRun)
    assert re.search(message, listed.problem)
    with pytest.raises(LensError, match=f"{message}.*or move .* away to start afresh"):
        RunWriter.start(tmp_path, CONFIG, META)
    with pytest.raises(LensError, match=message):
        find_run(tmp_path, run.id)


@pytest.mark.parametrize(
    ("entry", "value"), [("attending", True), ("attending", [0, "x"]), ("part", ["a"])]
)
def test_what_a_run_can_be_without_is_left_out_and_said(tmp_path, entry, value):
    run = finished(tmp_path)
    model = {**run.meta["model"], entry: value}
    write_json(run.path / "run.json", {**run.meta, "model": model})
    found = open_run(run.path)
    assert found.meta["model"][entry] is None
    assert f"model.{entry}" in " ".join(found.damage)


def test_a_fault_while_a_file_is_read_names_it(tmp_path):
    write_text(tmp_path / "x", "a")
    with (
        pytest.raises(LensError, match=r"x cannot be read.*broken"),
        open_regular(tmp_path / "x", most=9),
    ):
        raise OSError(5, "broken")


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    run = finished(tmp_path)
    original = os.open

    def refused(path, *options, **more):
        if Path(path).name == "run.json":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *options, **more)

    monkeypatch.setattr(os, "open", refused)
    [listed] = list_runs(tmp_path)
    assert listed.id == run.id
    assert "Permission denied" in listed.problem


def test_missing_and_damaged_tables_are_named(tmp_path):
    run = finished(tmp_path)
    (run.path / "heads.parquet").write_bytes(b"PAR1 nonsense")
    (run.path / "prompts.parquet").rename(tmp_path / "prompts.parquet")
    run = open_run(run.path)
    with pytest.raises(LensError, match=r"heads\.parquet has 13 bytes instead of"):
        _ = run.heads
    with pytest.raises(LensError, match=r"prompts\.parquet is missing: the run is success"):
        _ = run.prompts
    (run.path / "manifest.json").unlink()
    (tmp_path / "prompts.parquet").rename(run.path / "prompts.parquet")
    run = open_run(run.path)
    with pytest.raises(LensError, match=r"heads\.parquet: it is damaged: ArrowInvalid"):
        _ = run.heads
    (run.path / "config.toml").write_text("=")
    with pytest.raises(LensError, match=r"config\.toml cannot be read"):
        _ = run.config


def test_no_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(LensError, match="`lens demo` or `lens run` makes runs"):
        list_runs(tmp_path / "none")
    with pytest.raises(LensError, match="is no run folder"):
        open_run(tmp_path)
    assert find_by_config(tmp_path / "none", CONFIG) is None


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert json.loads(file.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
