"""`lens list`, `lens validate` and the naming of runs on the command line."""

import json
import os
import shutil

import pytest
from lens_analyses.listing import delete_run, resolve

from lens.common.errors import LensError
from lens.runs import open_run


@pytest.fixture
def copy(run_folder, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(run_folder, tmp_path / "runs" / run_folder.name)


def change(folder, **entries):
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_list_shows_status_and_prompts(lens_command, run_folder):
    answer = lens_command("list", run_folder.parent)
    assert answer.code == 0
    heading, row = answer.out.splitlines()
    assert heading.split() == ["STATUS", "PROMPTS", "RUN"]
    assert row.split()[:3] == ["success", "5/5", run_folder.name]
    assert row.endswith("text-lm-3l on 3 text prompts and 2 copied prompts")


def test_list_takes_the_folder_in_every_way_that_others_do(lens_command, run_folder):
    folder = run_folder.parent
    said = {
        lens_command("list", *words).out
        for words in ([folder], ["--runs", folder], ["--out", folder])
    }
    assert len(said) == 1
    assert run_folder.name in said.pop()


def test_list_as_json(lens_command, run_folder):
    answer = lens_command("list", run_folder.parent, "--json")
    (run,) = answer.json["runs"]
    assert (run["id"], run["status"], run["model"]) == (run_folder.name, "success", "text-lm-3l")
    assert run["path"] == str(run_folder)


def test_list_of_an_empty_and_of_no_folder(lens_command, tmp_path):
    answer = lens_command("list", tmp_path)
    assert answer.code == 0
    assert "no runs in" in answer.out
    answer = lens_command("list", tmp_path / "none")
    assert answer.code == 1
    assert "there is no folder" in answer.err


def test_a_run_whose_process_is_gone_is_partial(lens_command, copy):
    change(copy, status="started", pid=2**22 + 1, prompts={"total": 5, "done": 2})
    answer = lens_command("list", copy.parent)
    assert answer.out.splitlines()[1].split()[:2] == ["partial", "2/5"]
    assert f"complete it: lens run -c {copy / 'config.toml'}" in answer.out


def test_a_run_whose_process_lives_is_started(lens_command, copy):
    change(copy, status="started", pid=os.getppid(), process_started=None)
    assert lens_command("list", copy.parent).out.splitlines()[1].split()[0] == "started"


def test_broken_runs_are_listed_with_their_problem(lens_command, copy):
    change(copy, schema_version=99)
    answer = lens_command("list", copy.parent)
    assert answer.code == 0
    assert "broken" in answer.out
    assert "version 99, this attention-lens reads" in answer.out
    (run,) = lens_command("list", copy.parent, "--json").json["runs"]
    assert run["status"] == "error"
    assert "version 99" in run["problem"]


def test_validate_a_whole_run(lens_command, run_folder):
    answer = lens_command("validate", run_folder, "--json")
    assert answer.code == 0
    assert answer.json == {
        "id": run_folder.name,
        "status": "success",
        "problems": [],
        "manifest": True,
    }
    assert lens_command("validate", run_folder).out == f"{run_folder.name}: valid\n"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "heads.parquet").unlink(), "heads.parquet is missing; run it again"),
        (
            lambda f: (f / "prompts.parquet").write_bytes(b"x"),
            "prompts.parquet has 1 bytes instead of",
        ),
        (
            lambda f: (f / "trace/p001/layer-02.safetensors").unlink(),
            "trace/p001/layer-02.safetensors is missing",
        ),
        (lambda f: (f / "report.json").write_text(""), "report.json has 0 bytes instead of"),
    ],
)
def test_validate_names_what_is_damaged(lens_command, copy, damage, problem):
    damage(copy)
    answer = lens_command("validate", copy)
    assert answer.code == 1
    assert problem in answer.out
    assert all(line.startswith(f"{copy.name}: ") for line in answer.out.splitlines())
    assert any(
        problem in found for found in lens_command("validate", copy, "--json").json["problems"]
    )


@pytest.mark.parametrize("command", ["validate", "report"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change(f, schema_version=7),
            "it was written by attention-lens 0.1.0: read it with",
        ),
        (lambda f: (f / "run.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "run.json").unlink(), "is no run folder"),
    ],
)
def test_a_run_that_cannot_be_opened(lens_command, copy, command, damage, message):
    damage(copy)
    answer = lens_command(command, copy)
    assert answer.code == 1
    assert answer.out == ""
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1


def test_a_report_without_its_table_says_how_to_get_it(lens_command, copy):
    (copy / "heads.parquet").unlink()
    answer = lens_command("report", copy)
    assert answer.code == 1
    assert f"lens run -c {copy / 'config.toml'}" in answer.err


def test_a_run_is_found_by_folder_id_and_end_of_id(run_folder):
    runs = run_folder.parent
    for name in (str(run_folder), run_folder.name, run_folder.name[-8:]):
        assert resolve(name, runs).path == open_run(run_folder).path


def test_a_run_that_is_not_there_or_not_the_only_one(copy):
    shutil.copytree(copy, copy.parent / f"other-{copy.name}")
    with pytest.raises(LensError, match=r"could be any of .*give more of the id"):
        resolve(copy.name[-8:], copy.parent)
    with pytest.raises(LensError, match="no run 'nothing', neither as a folder nor in"):
        resolve("nothing", copy.parent)
    with pytest.raises(LensError, match="no run 'nothing'"):
        resolve("nothing", copy.parent / "nowhere")


def test_a_broken_run_is_not_resolved(copy):
    change(copy, schema_version=99)
    with pytest.raises(LensError, match="version 99"):
        resolve(copy.name, copy.parent)


def test_a_run_is_deleted_when_asked_and_nothing_of_others(
    lens_command, run_folder, tmp_path, monkeypatch
):
    one, other = tmp_path / run_folder.name, tmp_path / "kept"
    shutil.copytree(run_folder, one)
    shutil.copytree(run_folder, other)
    (one / "notes.txt").write_text("mine")
    refused = lens_command("delete", one, "--runs", tmp_path)
    assert refused.code == 2
    assert "is not deleted; --yes deletes it without asking" in refused.err
    assert (one / "run.json").exists()
    answer = lens_command("delete", one, "--runs", tmp_path, "--yes", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["left"] == 1
    assert [path.name for path in one.iterdir()] == ["notes.txt"]
    assert (other / "heads.parquet").exists()
    whole = lens_command("delete", other, "--yes")
    assert whole.code == 0
    assert not other.exists()
    shutil.copytree(run_folder, other)
    looked_up = open_run(other)
    change(
        other, status="started", pid=os.getppid(), process_started=None
    )  # it is gone on with before the answer comes
    with pytest.raises(LensError, match="is being computed right now"):
        delete_run(looked_up)
    busy = lens_command("delete", other, "--yes")
    assert (busy.code, other.exists()) == (1, True)
    assert "is being computed right now" in busy.err
