"""The queue, the desk and the worker: order, refusals, cancelling, a killed worker, the same numbers."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from lens_analyses.config import RunConfig
from lens_analyses.jobs.desk import JobDesk
from lens_analyses.jobs.form import form
from lens_analyses.jobs.store import LOG_LINES, JobStore
from lens_analyses.jobs.worker import work

from lens.common.errors import LensError

from .conftest import tables

SMALL = {"model.name": "induction-2l", "prompts.copied": 2}
MANY = {"model.name": "text-lm-3l", "prompts.copied": 40, "capture.keep_qk": False}


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
        ({"what": "heads", "analysis.task": "x.jsonl"}, "a task from a file is started on the command line"),
        ({"model.nam": "x"}, "unknown setting model.nam; did you mean model.name?"),
        ({"prompts.tokens": "3"}, "prompts.tokens must be an integer"),
        ({"what": "rm -rf"}, "what must be one of"),
    ],
)  # fmt: skip
def test_the_desk_refuses_what_the_command_would(desk, settings, reason):
    with pytest.raises(LensError, match=re.escape(reason)):
        desk.submit("run", settings)
    assert desk.state()["jobs"] == []


def test_a_job_is_the_command_that_a_person_would_type(desk):
    desk.submit("run", {**SMALL, "model.name": "$(touch x); '", "seed": None})
    (job,) = desk.state()["jobs"]
    assert job["command"] == """lens run --model '$(touch x); '"'"'' --copied 2"""
    assert job["config"]["model"] == {"name": "$(touch x); '"}


def test_the_form_has_every_setting_but_files():
    names = [field["name"] for field in form()]
    assert names[:2] == ["what", "model.name"]
    config = RunConfig().as_mapping() | {"analysis": {}}
    flat = [f"{s}.{n}" for s, values in config.items() if isinstance(values, dict) for n in values]
    assert set(flat) <= set(names)
    assert not {"prompts.text", "prompts.batch", "prompts.sha256"} & set(names)
    fields = {field["name"]: field for field in form()}
    assert all(field["help"] for field in fields.values())
    assert fields["analysis.rule"]["whats"] == ["redistribute"]
    assert fields["prompts.copied"]["kind"] == "integer"
    assert fields["capture.keep_qk"]["kind"] == "boolean"
    assert "text-lm-3l" in fields["model.name"]["choices"]
    started = {name: field["start"] for name, field in fields.items() if field["start"] is not None}
    RunConfig.load(None, started)


@pytest.mark.slow
def test_a_worker_computes_runs_and_estimates_and_goes_on_after_a_failure(
    desk, tmp_path, lens_command
):
    desk.submit("estimate", SMALL)
    desk.submit("run", {**SMALL, "model.name": "no-such-model"})
    desk.submit("run", SMALL)
    assert work(tmp_path, once=True) == 3
    run, failed, estimate = desk.state()["jobs"]
    assert (estimate["status"], estimate["result"]["prompts"], estimate["run"]) == (
        "success",
        2,
        None,
    )
    assert failed["status"] == "error"
    assert "unknown model 'no-such-model'" in failed["error"]
    assert run["status"] == "success", desk.log(run["id"])
    assert "scoring 8 heads" in desk.log(run["id"])
    straight = lens_command(*run["command"].split()[1:], "--out", tmp_path / "straight", "--json")
    for mine, theirs in zip(
        tables(tmp_path / run["run"]), tables(straight.json["path"]), strict=True
    ):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


def wait_for(desk, condition, what):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        job = desk.state()["jobs"][0]
        if condition(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"{what}: {job}, {desk.log(job['id'])}")


def half_done(job):
    return job["run"] is not None and (job["progress"] or 0) > 0


@pytest.mark.slow
def test_a_killed_worker_is_seen_its_child_ends_and_the_job_is_resumed(desk, tmp_path, spawn_lens):
    number = desk.submit("run", MANY)
    worker = spawn_lens("worker", "--runs", tmp_path)
    job = wait_for(desk, half_done, "the job did not start")
    assert desk.state()["workers"] == 1
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    job = wait_for(desk, lambda job: job["status"] == "lost", "the dead worker was not seen")
    assert desk.state()["workers"] == 0
    index = tmp_path / job["run"] / "run.json"
    deadline = time.monotonic() + 60
    while '"status": "partial"' not in index.read_text():  # the child ended in order
        assert time.monotonic() < deadline
        time.sleep(0.05)
    desk.retry(number)
    assert work(tmp_path, once=True) == 1
    done = desk.state()["jobs"][0]
    assert (done["status"], done["run"]) == ("success", job["run"])
    assert any("of 40 prompts were finished before" in line for line in desk.log(number))


@pytest.mark.slow
def test_a_running_job_is_cancelled_in_order(desk, tmp_path, spawn_lens):
    number = desk.submit("run", MANY)
    worker = spawn_lens("worker", "--runs", tmp_path, "--once")
    wait_for(desk, half_done, "the job did not start")
    desk.cancel(number)
    job = wait_for(desk, lambda job: job["status"] == "cancelled", "it was not cancelled")
    assert "it can be resumed" in job["error"]
    assert '"status": "partial"' in (Path(tmp_path) / job["run"] / "run.json").read_text()
    worker.communicate(timeout=60)
    assert worker.returncode == 0
