"""The queue, the desk and the worker: order, refusals, cancelling, a killed worker, the same numbers."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading

import pandas as pd
import pytest
from lens_analyses.config import WHATS, RunConfig, load_config, make_config
from lens_analyses.config.models import CONFIGS
from lens_analyses.jobs import store as store_module
from lens_analyses.jobs import worker as worker_module
from lens_analyses.jobs.desk import JobDesk
from lens_analyses.jobs.form import form
from lens_analyses.jobs.store import LOG_LINES, MOST_WAITING, JobStore
from lens_analyses.jobs.worker import share, work
from lens_analyses.steps import STEPS

import lens
from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.sections import Section
from lens.runs.writer import RunWriter
from tests.lens.made_runs import meta

from .conftest import tables
from .stub_worker import STUB

SMALL = {"model.name": "induction-2l", "prompts.copied": 2}


def environment():
    """Where a process of its own finds the packages, as this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path)


@pytest.fixture
def desk(tmp_path):
    return JobDesk(tmp_path)


def test_jobs_are_claimed_once_and_in_their_order(tmp_path, store):
    first, second = (store.submit("run", {"seed": number}, f"c{number}") for number in (5, 6))
    assert [job.id for job in store.jobs()] == [second, first]
    claimed = [JobStore(tmp_path).claim(), store.claim(), store.claim()]
    assert [job and job.config["seed"] for job in claimed] == [5, 6, None]
    assert claimed[0].status == "running"
    assert claimed[0].worker["pid"] == os.getpid()
    store.advance(first, progress=0.25, step="1 of 4 prompts", run="r")
    store.finish(first, "success", result={"seconds": 2.5})
    done = store.job(first)
    assert (done.status, done.run, done.result, done.step) == (
        "success",
        "r",
        {"seconds": 2.5},
        None,
    )


def test_a_job_that_waits_is_cancelled_at_once(store):
    number = store.submit("run", {}, "c")
    store.cancel(number)
    assert store.job(number).status == "cancelled"
    assert store.claim() is None
    with pytest.raises(
        LensError, match="job 1 is cancelled; only one that is queued or running can be cancelled"
    ):
        store.cancel(number)
    store.retry(number)
    assert (store.job(number).status, store.job(number).cancel) == ("queued", False)
    with pytest.raises(LensError, match="is queued; only one that is partial or error or"):
        store.retry(number)


def test_unknown_jobs_and_kinds_are_refused(store):
    with pytest.raises(LensError, match="there is no job 7"):
        store.job(7)
    with pytest.raises(LensError, match="a job is one of run, estimate, got 'shell'"):
        store.submit("shell", {}, "")


def test_a_damaged_queue_says_what_to_do(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 200)
    with pytest.raises(LensError, match=r"jobs\.sqlite cannot be used .* delete it"):
        JobStore(tmp_path)


def test_a_job_of_a_process_that_is_gone_is_lost_and_can_be_resumed(tmp_path, store):
    number = store.submit("run", {}, "c")
    store.claim()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as rows:
        rows.execute("update jobs set worker = json_set(worker, '$.pid', ?)", (gone.pid,))
    assert store.job(number).status == "lost"
    assert "resume it" in store.job(number).error
    store.retry(number)
    assert store.claim().id == number


def test_a_job_that_was_made_again_meanwhile_is_not_made_again_twice(tmp_path, store, monkeypatch):
    number = store.submit("run", {}, "c")
    store.claim()
    store.finish(number, "error", error="e")
    check = JobStore._check

    def beside(self, rows, *more):
        check(self, rows, *more)
        with pytest.raises(LensError, match="locked"):  # of another process, which would claim it
            JobStore(tmp_path).retry(number)

    monkeypatch.setattr("lens_analyses.jobs.store._WAIT", 0.01)
    monkeypatch.setattr(JobStore, "_check", beside)
    store.retry(number)
    monkeypatch.setattr(JobStore, "_check", check)
    assert store.claim().id == number
    with pytest.raises(LensError, match=f"job {number} is running"):
        store.retry(number)


def test_workers_are_counted_while_they_are_there(store):
    assert store.workers() == 0
    store.see_worker()
    store.see_worker()
    assert store.workers() == 1


def test_the_log_is_bounded(store):
    number = store.submit("run", {}, "c")
    assert store.log(number) == []
    store.log_path(number).write_text("".join(f"line {line}\n" for line in range(30_000)))
    lines = store.log(number)
    assert len(lines) == LOG_LINES
    assert lines[-1] == "line 29999"
    with pytest.raises(LensError, match="there is no job 9"):
        store.log(9)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompts.text": "/etc/passwd"}, "prompts.text names a file of this machine"),
        ({"prompts.batch": "x"}, "prompts.batch names a file"),
        ({"prompts": {"text": "/etc/passwd"}}, "prompts.text names a file of this machine"),
        ({"what": "heads", "analysis": {"task": "x.jsonl"}}, "analysis.task names a file of this"),
        ({"model": {"name": "/etc"}}, "model.name names a file of this machine"),
        ({"model.name": "~"}, "model.name names a file of this machine"),
        ({"model.name": "a" * 5000}, "unknown model 'aaa"),
        ({"model.revision": "a" * 5000}, "model.revision must be text of at most 4,096 characters"),
        ({"model.revision": "a\0b"}, "model.revision must be text without control characters"),
        ({"prompts.copied": 10**30}, "prompts.copied must be at most 9,007,199,254,740,992"),
        ({"model.name": "no-such-model"}, "unknown model 'no-such-model'"),
        ({"what": "heads", "analysis.task": "iot"}, "unknown task 'iot'"),
        ({"what": "heads", "analysis.task": "x.jsonl"}, "start that run on the command line"),
        ({"model.nam": "x"}, "unknown setting model.nam; did you mean model.name?"),
        ({"prompts.tokens": "3"}, "prompts.tokens must be an integer of at least 1, got '3'"),
        ({"what": "rm -rf"}, "what must be one of"),
    ],
)  # fmt: skip
def test_the_desk_refuses_what_the_command_would(desk, settings, reason):
    with pytest.raises(LensError, match=re.escape(reason)):
        desk.submit("run", settings)
    assert desk.state()["jobs"] == []


def test_a_job_is_the_command_that_a_person_would_type(desk):
    settings = {**SMALL, "model.name": "owner/model", "model.revision": "$(touch x); '"}
    desk.submit("run", {**settings, "seed": None})
    (job,) = desk.state()["jobs"]
    assert job["command"] == (
        """lens run --model owner/model --revision '$(touch x); '"'"'' --copied 2"""
    )
    assert job["config"]["model"] == {"name": "owner/model", "revision": "$(touch x); '"}


def test_the_form_has_every_setting_and_says_what_it_is():
    names = [field["name"] for field in form()]
    assert names[:2] == ["what", "model.name"]
    flat = [
        f"{section}.{name}"
        for section, values in RunConfig().as_mapping().items()
        if isinstance(values, dict)
        for name in values
    ]
    assert set(flat) <= set(names)
    assert all(field["help"] for field in form())
    fields = {field["name"]: field for field in form()}
    assert fields["analysis.rule"]["whats"] == ["sinks", "redistribute"]
    assert fields["prompts.copied"]["kind"] == "integer"
    assert fields["capture.keep_qk"]["kind"] == "boolean"
    assert "text-lm-3l" in fields["model.name"]["choices"]


def test_a_form_names_no_file_and_its_settings_go_with_their_analysis():
    fields = {field["name"]: field for field in form()}
    assert not {"prompts.text", "prompts.batch", "prompts.sha256"} & set(fields)
    assert fields["analysis.n"]["whats"] == [
        "heads",
        "sinks",
        "redistribute",
        "policies",
        "mixers",
        "explain",
        "examples",
        "patch",
        "circuit",
    ]
    assert fields["analysis.task"]["whats"] == [
        "heads",
        "redistribute",
        "explain",
        "patch",
        "circuit",
    ]
    assert fields["analysis.rule"]["choices"][0] == fields["analysis.rule"]["start"] == "transfer"
    assert (fields["prompts.tokens"]["least"], fields["analysis.n"]["least"]) == (1, 2)
    assert fields["model.dtype"]["default"] is None
    assert [name for name in fields if fields[name]["more"]] == [
        *("model.revision", "model.dtype", "model.device", "model.part", "prompts.copied_length"),
        *(
            "capture.block_size",
            "capture.chunk",
            "capture.keep_qk",
            "capture.backend",
            "analysis.length",
        ),
    ]


def test_pictures_are_offered_where_files_may_be_read():
    for files in (False, True):
        fields = {field["name"]: field for field in form(files=files)}
        assert ("vision" in fields["what"]["choices"]) == files
        assert ("prompts.image" in fields) == files
    assert fields["prompts.image"]["whats"] == list(WHATS)  # others: of encoder-decoders
    assert fields["prompts.images"]["whats"] == [
        "heads",
        "sinks",
        "redistribute",
        "vision",
        "circuit",
    ]
    assert fields["prompts.boxes"]["whats"] == ["vision"]


@pytest.mark.parametrize("what", [one for one in WHATS if one != "vision"])
def test_the_start_of_the_form_is_a_run_of_every_analysis(what):
    started = {
        field["name"]: field["start"]
        for field in form()
        if field["start"] is not None and what in field["whats"]
    }
    config = load_config(None, {**started, "what": what})
    assert (config.what, config.prompts.text_name) == (what, "moby-dick")


def test_the_run_to_compare_with_is_one_of_the_folder(desk, tmp_path):
    circuit = {"what": "circuit", "model.name": "induction-2l"}
    desk.submit("run", {**circuit, "analysis.compare": "other"})
    (job,) = desk.state()["jobs"]
    assert job["config"]["analysis"]["compare"] == str((tmp_path / "other").resolve())
    for outside in ("../other", "/etc", "a/b"):
        with pytest.raises(LensError, match=r"analysis\.compare must be the id of a run in"):
            desk.submit("run", {**circuit, "analysis.compare": outside})


def profile(tmp_path, done):
    """A run with so many of three prompts done."""
    writer = RunWriter.start(tmp_path, {"what": "heads"}, meta(what="heads"))
    writer.update(prompts={"total": 3, "done": done})
    return writer


def test_progress_counts_prompts_and_then_sections(tmp_path):
    config = make_config({"what": "heads"})
    steps = [step.name for step in STEPS["heads"] if step.setting is None]
    writer = profile(tmp_path, done=1)
    whole = 3 + len(steps)
    assert share(writer.path, writer.meta, config) == (1 / whole, "1 of 3 prompts")
    writer.update(prompts={"total": 3, "done": 3})
    assert share(writer.path, writer.meta, config) == (3 / whole, "roles")
    for number, name in enumerate(steps, 1):
        Section(name, name, ("s",), (), {}, {}, {}).save(writer.path)
        part, words = share(writer.path, writer.meta, config)
        assert part == (3 + number) / whole
        assert words == (steps[number] if number < len(steps) else "writing the report")
    assert part == 1


def test_progress_counts_a_section_that_cannot_be_had(tmp_path):
    config = make_config({"what": "heads"})
    steps = [step.name for step in STEPS["heads"] if step.setting is None]
    writer = profile(tmp_path, done=3)
    for name in steps[1:]:
        Section(name, name, ("s",), (), {}, {}, {}).save(writer.path)
    writer.update(unsupported={steps[0]: "the prompts are pictures"})
    assert share(writer.path, writer.meta, config) == (1, "writing the report")


def test_progress_counts_a_step_only_where_it_is_wanted(tmp_path):
    writer = profile(tmp_path, done=3)
    meta = {**writer.meta, "what": "circuit"}
    plain, compared = (
        make_config({"what": "circuit", "analysis": analysis})
        for analysis in ({}, {"compare": "other"})
    )
    assert share(writer.path, meta, plain) == (3 / 7, "edges")
    assert share(writer.path, meta, compared) == (3 / 8, "edges")


def test_progress_of_an_encoder_decoder_counts_the_steps_that_it_has(tmp_path):
    writer = profile(tmp_path, done=3)
    meta = {**writer.meta, "what": "sinks", "model": {**writer.meta["model"], "part": "cross"}}
    config = make_config({"what": "sinks"})
    assert share(writer.path, meta, config) == (3 / 7, "alignment")
    for name in ("alignment", "detection", "effects", "dose"):
        Section(name, name, ("s",), (), {}, {}, {}).save(writer.path)
    assert share(writer.path, meta, config) == (1, "writing the report")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(worker_module, "_POLL", 0.02)


@pytest.fixture
def told(tmp_path_factory, monkeypatch):
    """A FIFO on which the stub says that it is half done; closed when it is gone."""
    fifo = tmp_path_factory.mktemp("told") / "fifo"
    os.mkfifo(fifo)
    monkeypatch.setenv("STUB_TELLS", str(fifo))
    return fifo


def test_a_worker_makes_every_job_and_goes_on_after_a_failure(desk, tmp_path, quick):
    desk.submit("estimate", SMALL)
    desk.submit("run", {**SMALL, "seed": 13})
    desk.submit("run", SMALL)
    assert work(tmp_path, once=True, child=STUB) == 3
    run, failed, estimate = desk.state()["jobs"]
    assert (estimate["status"], estimate["run"]) == ("success", None)
    assert estimate["result"] == {"prompts": 2, "seconds": 1.5}
    assert (failed["status"], failed["error"], failed["run"]) == ("error", "no luck", None)
    assert run["status"] == "success", desk.log(run["id"])
    assert open_run(tmp_path / run["run"]).status == "success"
    assert desk.log(run["id"]) == ["begun"]


def test_a_job_that_cannot_be_read_is_an_error_and_no_process(desk, store, tmp_path):
    store.submit("run", {"what": "heads", "analysis": {"n": "many"}}, "lens heads")
    assert work(tmp_path, once=True, child=("no such program",)) == 1
    (job,) = desk.state()["jobs"]
    assert (job["status"], job["error"]) == (
        "error",
        "analysis.n must be an integer of at least 2, got 'many'",
    )


def test_a_running_job_is_cancelled_in_order(desk, tmp_path, quick, told):
    number = desk.submit("run", SMALL)
    worker = threading.Thread(target=work, args=(tmp_path,), kwargs={"once": True, "child": STUB})
    worker.start()
    with told.open() as stub:
        assert stub.readline() == "half\n"
        desk.cancel(number)
        assert stub.read() == ""  # it is gone
    worker.join()
    (job,) = desk.state()["jobs"]
    assert (job["status"], job["error"]) == ("cancelled", "cancelled; it can be resumed")
    assert open_run(tmp_path / job["run"]).status == "partial"


def test_a_stopped_worker_ends_its_job_in_order(desk, tmp_path, quick, told):
    desk.submit("run", SMALL)
    stopped = threading.Event()
    how = {"stopped": stopped.is_set, "child": STUB}
    worker = threading.Thread(target=work, args=(tmp_path,), kwargs=how)
    worker.start()
    with told.open() as stub:
        assert stub.readline() == "half\n"
        stopped.set()
        assert stub.read() == ""
    worker.join()
    (job,) = desk.state()["jobs"]
    assert job["error"] == "the worker was stopped; it can be resumed"
    assert open_run(tmp_path / job["run"]).status == "partial"


def test_a_killed_worker_is_seen_its_child_ends_and_the_job_is_resumed(
    desk, tmp_path, quick, told, monkeypatch
):
    number = desk.submit("run", SMALL)
    words = [sys.executable, STUB[1].replace("child", "worker"), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as worker:
        with told.open() as stub:
            assert stub.readline() == "half\n"
            assert worker.stdout is not None
            for line in worker.stdout:
                if json.loads(line)["progress"] == 0.5:
                    break
            (job,) = desk.state()["jobs"]
            assert (job["status"], job["step"]) == ("running", "1 of 2 prompts")
            assert (job["progress"], desk.state()["workers"]) == (0.5, 1)
            worker.kill()
            worker.wait()
            assert stub.read() == ""  # the child ended, too, and
        assert open_run(tmp_path / job["run"]).status == "partial"  # in order
    assert desk.state()["jobs"][0]["status"] == "lost"
    assert desk.state()["workers"] == 0
    monkeypatch.delenv("STUB_TELLS")
    desk.retry(number)
    assert work(tmp_path, once=True, child=STUB) == 1
    done = desk.state()["jobs"][0]
    assert (done["status"], done["run"]) == ("success", job["run"])
    assert desk.log(number) == ["begun", "resumed"]


def test_a_job_ends_with_the_numbers_of_the_command(desk, tmp_path, run_folder, lens_command):
    """The words that its process gets, said here."""
    config = load_config(run_folder / "config.toml", {})
    desk.submit("run", {name: config.value(name) for name in config.settings()})
    echo = "import json, sys; print(json.dumps(sys.argv[2:]), file=sys.stderr)"
    work(tmp_path, once=True, child=(sys.executable, "-c", echo))
    answer = lens_command(*json.loads(desk.log(1)[0]))
    assert answer.code == 0, answer.err
    made = tmp_path / answer.json["id"]
    assert made.name.rpartition("-")[2] == run_folder.name.rpartition("-")[2]
    for mine, theirs in zip(tables(made), tables(run_folder), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


def test_the_process_of_a_job_is_the_command_and_ends_without_its_worker():
    def child(parent):
        words = [*worker_module.CHILD, str(parent), "--version"]
        return subprocess.run(words, capture_output=True, text=True, env=environment())

    mine, orphan = child(os.getpid()), child(os.getppid())
    assert (mine.returncode, mine.stdout) == (0, f"attention-lens {lens.__version__}\n"), mine
    assert (orphan.returncode, orphan.stdout) == (1, "")


@pytest.fixture
def files(tmp_path):
    """A folder that jobs may read, with a text and a link out of it, and what is outside."""
    folder, secret = tmp_path / "files", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("not for a job")
    (folder / "text.txt").write_text("It was the best of times.")
    (folder / "link.txt").symlink_to(secret)
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_jobs_read_from_one_folder_and_nothing_that_leads_out_of_it(tmp_path, files, nested):
    desk, store = JobDesk(tmp_path / "runs", files), JobStore(tmp_path / "runs")

    def asked(section, name, value):
        return desk.submit(
            "run", {section: {name: str(value)}} if nested else {f"{section}.{name}": str(value)}
        )

    assert store.job(asked("prompts", "text", files / "text.txt")).config["prompts"]["text"] == str(
        files / "text.txt"
    )
    outside = [
        ("prompts", "text", files / "link.txt"),
        ("prompts", "text", files / ".." / "secret.txt"),
        ("prompts", "batch", tmp_path / "secret.txt"),
        ("model", "name", tmp_path),
        ("model", "name", files / ".."),
    ]
    for section, name, value in outside:
        with pytest.raises(LensError, match=rf"{section}\.{name} must be in "):
            asked(section, name, value)
    assert len(store.jobs()) == 1


def test_every_setting_that_names_files_is_held_to_the_folder(tmp_path, files):
    desk, text = JobDesk(tmp_path / "runs", files), {"prompts.text": str(files / "text.txt")}
    picture = files / "digit.png"
    picture.touch()
    two = {"what": "vision", "model.name": "vit-digits"}
    number = desk.submit("run", {**two, "prompts.image": f"{picture}, {picture}"})
    assert desk.state()["jobs"][0]["config"]["prompts"]["image"] == f"{picture},{picture}"
    desk.cancel(number)
    outside = {
        "prompts.image": {**two, "prompts.image": f"{picture},{tmp_path / 'secret.txt'}"},
        "analysis.published": {**text, "what": "policies", "analysis.published": "/etc/passwd"},
        "analysis.corpus": {**text, "what": "examples", "analysis.corpus": "/etc/passwd"},
        "prompts.images": {**two, "prompts.images": str(tmp_path)},
        "prompts.audio": {"what": "profile", "prompts.audio": "/etc/passwd"},
        "prompts.boxes": {
            **two,
            "prompts.image": str(picture),
            "prompts.boxes": str(tmp_path / "secret.txt"),
        },
        "prompts.labelled": {"what": "heads", "prompts.labelled": str(tmp_path / "secret.txt")},
        "prompts.target": {**text, "prompts.target": str(tmp_path / "secret.txt")},
    }
    for name, settings in outside.items():
        with pytest.raises(LensError, match=rf"{re.escape(name)} must be in "):
            desk.submit("run", settings)
    of_files = {
        name
        for config in CONFIGS.values()
        for name, one in config().settings().items()
        if one.shown.file and not one.shown.internal
    }
    assert of_files == {*outside, "prompts.text", "prompts.batch"}
    named = {
        name
        for config in CONFIGS.values()
        for name, one in config().settings().items()
        if re.search(r"\b(file|files|folder|table)\b", one.help, re.IGNORECASE)
    }
    assert named - of_files == {"analysis.task", "analysis.compare", "model.name", "prompts.sha256"}


def test_the_form_offers_files_only_where_jobs_may_read_them(tmp_path, files):
    assert "prompts.text" not in {entry["name"] for entry in JobDesk(tmp_path).form()}
    assert "prompts.text" in {entry["name"] for entry in JobDesk(tmp_path, files).form()}


def test_old_jobs_that_are_done_go_with_their_files(store, monkeypatch):
    monkeypatch.setattr(store_module, "_MOST", 3)
    waiting = store.submit("run", {}, "c")
    running = store.submit("run", {}, "c")
    for ended in ("success", "error"):
        store.finish(store.submit("run", {}, "c"), ended)
    with store._open() as rows:
        rows.execute("update jobs set status = 'running' where id = ?", (running,))
    store.log_path(running).write_text("x")
    store.log_path(running + 1).write_text("x")
    store.config_path(running + 1).write_text("x")
    newest = [store.submit("run", {}, "c") for _ in range(2)]
    with store._open() as rows:
        kept = [number for (number,) in rows.execute("select id from jobs order by id")]
    assert kept == [waiting, running, running + 2, *newest]
    assert sorted(path.name for path in store.folder.iterdir()) == [f"{running}.log"]


def test_the_queue_is_bounded(store):
    for number in range(MOST_WAITING):
        store.submit("run", {}, f"c{number}")
    store.cancel(1)
    store.retry(1)
    store.cancel(2)
    store.submit("run", {}, "the last")
    with pytest.raises(LensError, match="100 jobs wait already"):
        store.submit("run", {}, "too many")
    with pytest.raises(LensError, match="100 jobs wait already"):
        store.retry(2)
