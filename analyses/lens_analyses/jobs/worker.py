"""`lens worker`: takes jobs from the queue and makes each in a process of its own.

The process is started anew (never forked), so that a device is free when it ends, and it is a plain
`lens` command, so that what it leaves is what a person would get, resumable by the same command.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from lens.common.errors import LensError
from lens.common.files import write_text
from lens.runs import open_run
from lens.runs.folders import INDEX
from lens_analyses.config import RunConfig, make_config
from lens_analyses.console import OK, PARTIAL, log
from lens_analyses.jobs.store import Job, JobStore

CHILD = (sys.executable, "-m", "lens_analyses.jobs.child")
"""What a job's process is started with, before this process's number and the words of the command."""
_POLL = 0.5  # seconds
_GRACE = 30.0  # seconds that a process has to end in order


def work(
    runs: Path,
    *,
    once: bool = False,
    stopped: Callable[[], bool] = lambda: False,
    child: Sequence[str] = CHILD,
) -> int:
    """Compute jobs until stopped, or until the queue is empty.

    Args:
        runs: folder of run folders with the queue.
        once: end when nothing waits.
        stopped: asked twice a second; a running job is then ended in order, to be resumed.
        child: what a job's process is started with.

    Returns:
        How many jobs were taken.
    """
    store, taken = JobStore(runs), 0
    while not stopped():
        store.see_worker()
        job = store.claim()
        if job is None:
            if once:
                break
            time.sleep(_POLL)
            continue
        taken += 1
        log.info("job %d: %s", job.id, job.command)
        try:
            _compute(store, runs, job, stopped, child)
        except LensError as error:
            store.finish(job.id, "error", error=str(error))
        log.info("job %d: %s", job.id, store.job(job.id).status)
    return taken


def work_until_stopped(runs: Path, *, once: bool = False) -> None:
    """`work` until Ctrl-C or SIGTERM, which end the running job in order."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    log.info("worker %d on %s; stop it with Ctrl-C", os.getpid(), runs)
    work(runs, once=once, stopped=lambda: bool(asked))


@contextmanager
def beside(runs: Path) -> Iterator[int]:
    """A worker process that lives as long as the block; its number."""
    process = subprocess.Popen(
        [*CHILD, str(os.getpid()), "worker", "--runs", str(runs), "--quiet"],
        stdin=subprocess.DEVNULL,
        env=_environment(),
        start_new_session=True,  # Ctrl-C comes to this process alone, which then ends the worker
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(_GRACE + 5)
        except subprocess.TimeoutExpired:
            process.kill()


def _compute(
    store: JobStore, runs: Path, job: Job, stopped: Callable[[], bool], child: Sequence[str]
) -> None:
    config = make_config(job.config)
    write_text(store.config_path(job.id), tomli_w.dumps(dict(job.config)))
    arguments = ["run", "-c", str(store.config_path(job.id)), "--out", str(runs), "--json"]
    if job.kind == "estimate":
        arguments.append("--dry-run")
    words = [*child, str(os.getpid()), *arguments]
    with store.log_path(job.id).open("ab") as said, store.answer_path(job.id).open("wb") as answer:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=answer, stderr=said, env=_environment()
        )
        try:
            ended = _watch(store, runs, job, process, stopped, config)
        except BaseException:
            process.kill()  # nobody would follow it
            process.wait()
            raise
    _close(store, job, process.returncode, ended)


def _watch(
    store: JobStore,
    runs: Path,
    job: Job,
    process: subprocess.Popen[bytes],
    stopped: Callable[[], bool],
    config: RunConfig,
) -> str:
    """Follow the process to its end; why it was ended, "" when it was not."""
    reason, patience = "", float("inf")
    while True:
        try:
            process.wait(_POLL)
            return reason
        except subprocess.TimeoutExpired:
            pass
        store.see_worker()
        if not reason:
            reason = (
                "cancelled"
                if store.job(job.id).cancel
                else "the worker was stopped"
                if stopped()
                else ""
            )
            if reason:
                process.send_signal(signal.SIGTERM)
                patience = time.monotonic() + _GRACE
        elif time.monotonic() > patience:
            process.kill()
        progress, step, run = _progress(runs, process.pid, config)
        store.advance(job.id, progress=progress, step=reason or step, run=run)


def _close(store: JobStore, job: Job, code: int, ended: str) -> None:
    answer = _answer(store.answer_path(job.id))
    run, message = answer.get("id"), (answer.get("error") or {}).get("message")
    if ended:
        store.finish(job.id, "cancelled", run=run, error=f"{ended}; it can be resumed")
    elif code == OK:
        result = answer if job.kind == "estimate" else None
        store.finish(job.id, "success", run=run, result=result)
    elif code == PARTIAL:
        store.finish(
            job.id, "partial", run=run, error=message or "it was stopped; it can be resumed"
        )
    else:
        store.finish(job.id, "error", run=run, error=message or _unexplained(code))


def _answer(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _unexplained(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, perhaps for want of memory; the log has its last words"
    return f"its process ended with code {code}; the log has its last words"


def _progress(runs: Path, pid: int, config: RunConfig) -> tuple[float | None, str, str | None]:
    """Share done, what is being done, and the run's id: from the run that the process writes."""
    for index in runs.glob(f"*/{INDEX}"):
        try:
            meta = open_run(index.parent).meta
        except LensError:
            continue
        if meta["pid"] == pid and meta["status"] == "started":
            return (*share(index.parent, meta, config), index.parent.name)
    return None, "loading the model", None


def share(folder: Path, meta: Mapping[str, Any], config: RunConfig) -> tuple[float, str]:
    """How much of a run is done, and what is done now.

    Args:
        folder: of the run.
        meta: its `run.json`.
        config: of the run.

    Returns:
        Finished prompts and sections, those included that cannot be had, among all that there will be, 0 to 1; words.
    """
    from lens.runs.sections import section_names
    from lens_analyses.config.prompts import labelled_by
    from lens_analyses.steps import steps_of

    labelled = labelled_by(config.prompts) is not None
    steps = [
        step.name
        for step in steps_of(meta["what"], meta["model"].get("part", ""), labelled)
        if step.is_wanted(config.analysis, config.prompts) and not step.why
    ]
    done, total = meta["prompts"]["done"], meta["prompts"]["total"]
    finished = {*section_names(folder), *meta.get("unsupported", ())}
    part = (done + len(finished.intersection(steps))) / max(1, total + len(steps))
    if done < total:
        return part, f"{done} of {total} prompts"
    left = [name for name in steps if name not in finished]
    return part, left[0].replace("_", " ") if left else "writing the report"


def _environment() -> dict[str, str]:
    """With the path of this process, so that an uninstalled checkout works too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
