"""Full disks, closed outputs, two starts at once, and command lines of every kind: told in one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lens_analyses.console import Output
from lens_analyses.steps import STEPS

from lens.common import files
from lens.common.errors import LensError, in_words
from lens.runs import open_run
from lens.runs.writer import RunWriter

from .command_lines import lines, make_places, problem
from .started import FORKING, forked

SMALL = ["run", "--model", "induction-2l", "--copied", "2", "--quiet"]
META = {
    **dict.fromkeys(("title", "command", "device", "backend", "bos"), "x"),
    **{
        "what": "profile",
        "model": {"name": "m", "layers": 1, "heads": 1},
        "prompts": {"total": 1, "done": 0},
    },
    **{"block_size": 1, "seed": 0, "versions": {}},
}


@pytest.fixture(scope="module")
def places(lens_command, tmp_path_factory):
    """Two runs and some bad files, for the command lines."""
    folder = tmp_path_factory.mktemp("lines")
    made = [
        lens_command(*SMALL, "--seed", seed, "--out", folder / "runs", "--json").json["path"]
        for seed in (1, 2)
    ]
    return make_places(folder, *map(Path, made))


def test_no_command_line_ends_raw(places, monkeypatch):
    monkeypatch.chdir(places["files"].parent)
    assert len(lines()) >= 150
    found = {line.text: problem(line, places) for line in lines() if not line.slow}
    assert {text: what for text, what in found.items() if what} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line in lines() if line.slow], ids=lambda line: line.text
)
def test_no_command_that_computes_ends_raw(places, monkeypatch, line):
    """Of an analysis the first two steps."""
    monkeypatch.setitem(STEPS, "heads", STEPS["heads"][:2])
    monkeypatch.chdir(places["files"].parent)
    assert problem(line, places) == ""


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("after", [0, 3, 9, 14])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    lens_command, tmp_path, monkeypatch, after
):
    fsync, written = os.fsync, []

    def full_after_some(handle):
        written.append(handle)
        (fsync if len(written) <= after else no_space)(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_after_some)
        answer = lens_command(*SMALL, "--out", tmp_path)
    assert (answer.code, answer.out) == (1, "")
    (line,) = [one for one in answer.err.splitlines() if one.startswith("error")]
    assert "there is no space left; free some and run the same command again" in line
    assert str(tmp_path) in line
    assert list(tmp_path.rglob(f"*{files.PART}")) == []
    again = lens_command(*SMALL, "--out", tmp_path, "--json")
    assert (again.code, again.json["status"]) == (0, "success")
    assert lens_command("validate", again.json["path"]).code == 0


def test_a_fault_of_the_system_that_a_writer_tells_in_words_names_the_file(tmp_path):
    def write(path):
        raise ValueError("I/O error: No space left on device (os error 28)")

    with pytest.raises(LensError, match="there is no space left") as full:
        files.write_atomically(tmp_path / "x", write)
    assert isinstance(full.value, OSError)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    with pytest.raises(ValueError, match="of its own"):
        files.write_atomically(tmp_path / "x", lambda path: int("of its own"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "/x: there is no space left; free some"),
        (errno.EROFS, "/x: it may not be read or written here"),
        (errno.EACCES, "/x: it may not be read or written here"),
        (errno.ENAMETOOLONG, "/x: its name is too long"),
        (errno.EIO, f"/x: {os.strerror(errno.EIO)}"),
    ],
)
def test_faults_of_the_system_are_told_in_words(capsys, number, said):
    with pytest.raises(SystemExit) as ended, Output().session():
        raise OSError(number, os.strerror(number), "/x")
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_long_path_is_shortened_in_an_error():
    assert len(in_words(OSError(errno.EIO, "broken", "x" * 5000))) < 400


def command(*arguments: str, **where: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, "-m", "lens_analyses", *arguments]
    return subprocess.Popen(words, text=True, env=environment, **where)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    process = command("list", str(tmp_path), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    said = process.communicate()[1]
    assert (process.returncode, said) == (1, "")


def test_a_run_goes_on_when_nobody_reads_its_log(spawn_lens, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [one for one in SMALL if one != "--quiet"]
    process = spawn_lens(*arguments, "--out", tmp_path, complaints=writing)
    os.close(writing)
    assert process.communicate()[0]
    assert process.returncode == 0
    assert open_run(next(tmp_path.iterdir())).status == "success"


def test_of_runs_that_start_at_once_one_works_and_the_others_say_so(tmp_path):
    starting = FORKING.Barrier(4), FORKING.Barrier(5), FORKING.Queue()
    started = [forked(_start, tmp_path / "runs", META, *starting) for _ in range(4)]
    said = [starting[2].get(timeout=100) for _ in started]
    starting[1].wait(100)
    for process in started:
        process.join()
    assert sorted(said) == ["refused", "refused", "refused", "works"]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def _start(folder, meta, at_once, answered, said):
    """Starts a run together with others, and ends when all have answered."""
    at_once.wait(100)
    try:
        RunWriter.start(folder, {"a": 1}, meta)
        said.put("works")
    except LensError as error:
        said.put("refused" if "is writing" in str(error) else str(error))
    answered.wait(100)


def test_starting_waits_for_one_that_starts(tmp_path):
    with files.alone_in(tmp_path):
        writer = subprocess.Popen(
            [sys.executable, "-c", "import sys; from pathlib import Path; from lens.common.files import alone_in\n"
             "with alone_in(Path(sys.argv[1])): print('in', flush=True)", str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(2)
    assert writer.communicate()[0] == "in\n"


def test_a_run_of_another_machine_with_a_date_to_come_can_be_resumed(tmp_path):
    writer = RunWriter.start(tmp_path, {"a": 1}, META)
    files.write_json(
        writer.path / "run.json",
        {**writer.meta, "host": "elsewhere", "pid": 1, "updated": "2099-01-01T00:00:00+00:00"},
    )
    assert open_run(writer.path).status == "partial"
    assert RunWriter.start(tmp_path, {"a": 1}, META).resumed
    files.write_json(writer.path / "run.json", {**writer.meta, "host": "elsewhere", "pid": 1})
    with pytest.raises(LensError, match="is writing"):
        RunWriter.start(tmp_path, {"a": 1}, META)


def test_an_address_that_others_reach_is_refused_before_a_link_is_printed(lens_command, run_folder):
    answer = lens_command("view", run_folder.parent, "--host", "0.0.0.0", "--port", "18765")
    assert answer.code == 2
    assert "can be reached by others: give a token" in answer.err
    assert "dashboard:" not in answer.err + answer.out
