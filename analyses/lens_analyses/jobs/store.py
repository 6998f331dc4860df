"""`jobs.sqlite`: the queue that dashboard and workers share (docs/schema/jobs.md). Needs no torch."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.runs.processes import is_writing, this_process

FILE, FOLDER = "jobs.sqlite", "jobs"
KINDS = ("run", "estimate")
ACTIVE = ("queued", "running")
LOG_LINES = 500
_LOG_BYTES = 256 << 10
_WAIT = 10.0  # seconds for another process to finish its write
_MOST = 200
"""Jobs that are listed; older ones are kept while they wait or run."""
MOST_WAITING = 100
"""Jobs in the queue."""
_LARGEST = 2**63 - 1  # of a number in SQLite
_SCHEMA = """
create table if not exists jobs (
    id integer primary key, kind text not null, config text not null, command text not null,
    status text not null, cancel integer not null default 0, progress real, step text, run text,
    error text, result text, created text not null, started text, ended text, worker text
);
create table if not exists workers (pid integer primary key, process text not null, seen text not null);
"""


@dataclass(frozen=True)
class Job:
    """One row of the queue.

    Attributes:
        id: number of the job.
        kind: `run`, or `estimate` (a dry run).
        config: the configuration, nested plain values.
        command: the same as a command line, for people.
        status: `queued`, `running`, `success`, `partial`, `error`, `cancelled`, or `lost` (its
            worker is gone).
        cancel: whether it was asked to stop.
        progress: share that is done, 0 to 1, or None.
        step: what is being done, in words.
        run: id of the run folder, once there is one.
        error: why it failed.
        result: what an estimate says.
        created, started, ended: ISO 8601, UTC.
        worker: process that computes it, as in `lens.runs.processes`.
    """

    id: int
    kind: str
    config: Mapping[str, Any]
    command: str
    status: str
    cancel: bool
    progress: float | None
    step: str | None
    run: str | None
    error: str | None
    result: Mapping[str, Any] | None
    created: str
    started: str | None
    ended: str | None
    worker: Mapping[str, Any] | None


class JobStore:
    """The queue of one folder of runs; every method is one transaction, safe between processes.

    Attributes:
        folder: with the configuration, log and answer of each job.
    """

    def __init__(self, runs: Path) -> None:
        self.folder = runs / FOLDER
        self._path = runs / FILE
        runs.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        with self._open() as rows:
            rows.executescript(_SCHEMA)

    def submit(self, kind: str, config: Mapping[str, Any], command: str) -> int:
        """Add a job at the end of the queue and return its number; the oldest that are done go.

        Raises:
            LensError: an unknown kind, or too many wait already.
        """
        if kind not in KINDS:
            raise LensError(f"a job is one of {', '.join(KINDS)}, got {kind!r}")
        with self._writing() as rows:
            self._check_room(rows)
            made = rows.execute(
                "insert into jobs (kind, config, command, status, created) values (?, ?, ?, 'queued', ?)",
                (kind, json.dumps(config), command, _now()),
            )
            assert made.lastrowid is not None
            gone = rows.execute(
                f"delete from jobs where status not in {ACTIVE} and id <= "
                "(select id from jobs order by id desc limit 1 offset ?) returning id",
                (_MOST,),
            ).fetchall()
        for (number,) in gone:
            for path in (self.config_path, self.answer_path, self.log_path):
                path(number).unlink(missing_ok=True)
        return made.lastrowid

    def jobs(self) -> list[Job]:
        """The latest jobs, newest first."""
        with self._open() as rows:
            found = rows.execute("select * from jobs order by id desc limit ?", (_MOST,)).fetchall()
        return [_job(row) for row in found]

    def job(self, number: int) -> Job:
        """One job.

        Raises:
            LensError: there is none of this number.
        """
        with self._open() as rows:
            return self._job(rows, number)

    def claim(self) -> Job | None:
        """The oldest job in the queue, now of this process; None when nothing waits."""
        with self._writing() as rows:
            row = rows.execute(
                "select id from jobs where status = 'queued' order by id limit 1"
            ).fetchone()
            if row is not None:
                rows.execute(
                    "update jobs set status = 'running', started = ?, ended = null, worker = ? where id = ?",
                    (_now(), json.dumps(this_process()), row["id"]),
                )
        return None if row is None else self.job(row["id"])

    def advance(self, number: int, *, progress: float | None, step: str, run: str | None) -> None:
        """Say how far a running job is."""
        with self._open() as rows:
            rows.execute(
                "update jobs set progress = ?, step = ?, run = coalesce(?, run) where id = ?",
                (progress, step, run, number),
            )

    def finish(
        self,
        number: int,
        status: str,
        *,
        run: str | None = None,
        error: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """Close a job."""
        with self._open() as rows:
            rows.execute(
                "update jobs set status = ?, ended = ?, run = coalesce(?, run), error = ?, result = ?, "
                "step = null where id = ?",
                (
                    status,
                    _now(),
                    run,
                    error,
                    None if result is None else json.dumps(result),
                    number,
                ),
            )

    def cancel(self, number: int) -> None:
        """Ask a job to stop: one in the queue is closed at once, a running one by its worker.

        Raises:
            LensError: there is none, or it is neither waiting nor running.
        """
        with self._writing() as rows:
            self._check(rows, number, ACTIVE, "cancelled")
            rows.execute(
                "update jobs set cancel = 1, "
                "ended = case status when 'queued' then ? else ended end, "
                "status = case status when 'queued' then 'cancelled' else status end where id = ?",
                (_now(), number),
            )

    def retry(self, number: int) -> None:
        """Put a job back into the queue; a run goes on where it was left.

        Raises:
            LensError: there is none, or it waits or runs or is done, or too many wait already.
        """
        with self._writing() as rows:
            self._check_room(rows)
            self._check(rows, number, ("partial", "error", "cancelled", "lost"), "made again")
            rows.execute(
                "update jobs set status = 'queued', cancel = 0, error = null, progress = null, "
                "created = ?, ended = null, worker = null where id = ?",
                (_now(), number),
            )

    def see_worker(self) -> None:
        """Write down that this process works."""
        process = this_process()
        with self._open() as rows:
            rows.execute(
                "insert or replace into workers values (?, ?, ?)",
                (process["pid"], json.dumps(process), _now()),
            )

    def workers(self) -> int:
        """How many workers are there now."""
        with self._open() as rows:
            found = rows.execute("select process, seen from workers").fetchall()
        return sum(
            is_writing({**json.loads(row["process"]), "updated": row["seen"]}) for row in found
        )

    def config_path(self, number: int) -> Path:
        """Configuration that the job's process reads."""
        return self.folder / f"{number}.toml"

    def answer_path(self, number: int) -> Path:
        """What its process says on stdout: one JSON object."""
        return self.folder / f"{number}.json"

    def log_path(self, number: int) -> Path:
        """What its process says on stderr."""
        return self.folder / f"{number}.log"

    def log(self, number: int) -> list[str]:
        """The last `LOG_LINES` lines of a job's log.

        Raises:
            LensError: there is no such job.
        """
        path = self.log_path(self.job(number).id)
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _LOG_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        return text.splitlines()[-LOG_LINES:]

    @staticmethod
    def _check_room(rows: sqlite3.Connection) -> None:
        (waiting,) = rows.execute("select count(*) from jobs where status = 'queued'").fetchone()
        if waiting >= MOST_WAITING:
            raise LensError(
                f"{waiting} jobs wait already; cancel some, or wait until they are done"
            )

    @staticmethod
    def _job(rows: sqlite3.Connection, number: int) -> Job:
        known = (min(number, _LARGEST),)
        row = rows.execute("select * from jobs where id = ?", known).fetchone()
        if row is None:
            raise LensError(f"there is no job {number}")
        return _job(row)

    def _check(
        self, rows: sqlite3.Connection, number: int, allowed: tuple[str, ...], what: str
    ) -> None:
        job = self._job(rows, number)
        if job.status not in allowed:
            raise LensError(
                f"job {number} is {job.status}; only one that is {' or '.join(allowed)} can be {what}"
            )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, beside which no other process writes; an exception takes all of it back."""
        with self._open() as rows:
            rows.execute("begin immediate")
            yield rows
            rows.execute("commit")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=_WAIT, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            yield connection
        except sqlite3.Error as error:
            raise LensError(
                f"{self._path} cannot be used ({error}); delete it to start with an empty queue, "
                "runs are not touched"
            ) from error
        finally:
            connection.close()


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    for name in ("config", "result", "worker"):
        values[name] = None if values[name] is None else json.loads(values[name])
    job = Job(**{**values, "cancel": bool(values["cancel"])})
    if job.status == "running" and not is_writing({**(job.worker or {}), "updated": job.started}):
        return replace(
            job,
            status="lost",
            error="its worker is gone (killed, or the machine was restarted); resume it",
        )
    return job


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
