"""What the dashboard may ask of the queue: `lens_dashboards` gets this object and imports nothing of us."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.models.catalogue import KNOWN
from lens.runs import BrokenRun, list_runs
from lens_analyses.config import CircuitSettings, RunConfig, load_config, make_config
from lens_analyses.config.listed import listed
from lens_analyses.config.paths import is_task_file, local
from lens_analyses.jobs.form import form
from lens_analyses.jobs.store import JobStore
from lens_analyses.listing import delete_run


class JobDesk:
    """Submit, list, cancel and retry; every configuration is checked before it is queued.

    Args:
        runs: folder of runs, with the queue.
        files: the one folder from which a job may read texts, prompts, tasks and models; None: no folder.
    """

    def __init__(self, runs: Path, files: Path | None = None) -> None:
        self._store = JobStore(runs)
        self._runs = runs
        self._files = None if files is None else files.resolve()

    def form(self) -> list[dict[str, Any]]:
        """Settings of a new analysis; see `lens_analyses.jobs.form`."""
        return form(files=self._files is not None)

    def state(self) -> dict[str, Any]:
        """Jobs, newest first, and how many workers are there."""
        return {
            "workers": self._store.workers(),
            "start": f"lens worker --runs {self._runs}",
            "jobs": [asdict(job) for job in self._store.jobs()],
        }

    def log(self, number: int) -> list[str]:
        """The last lines of a job's log.

        Raises:
            LensError: there is no such job.
        """
        return self._store.log(number)

    def submit(self, kind: str, settings: Mapping[str, Any]) -> int:
        """Check dotted settings and queue a run, or an estimate of one.

        Raises:
            LensError: as `load_config`, an unknown kind, a full queue, or a setting that names a file or
                folder outside of what jobs may read.
        """
        config = load_config(None, {k: v for k, v in settings.items() if v is not None})
        values = config.as_mapping()
        for name, path in self._paths(config):
            section, _, field = name.partition(".")
            values[section][field] = path
        config = make_config(values)
        return self._store.submit(kind, config.as_mapping(), config.command())

    def _paths(self, config: RunConfig) -> Iterator[tuple[str, str]]:
        """Settings that name a path, and which: looks at what the settings came to, however they were written.

        Raises:
            LensError: one of them is outside of what jobs may read, links followed.
        """
        for name, one in config.settings().items():
            value = config.value(name)
            if one.shown.file and not one.shown.internal and value:
                parts = listed(value) if one.shown.several else [value]
                yield name, ",".join(str(self._inside(name, part)) for part in parts)
        task = getattr(config.analysis, "task", "")
        if is_task_file(task):
            yield "analysis.task", str(self._inside("analysis.task", task))
        if config.model.name not in KNOWN and local(config.model.name).exists():
            yield "model.name", str(self._inside("model.name", config.model.name))
        if isinstance(config.analysis, CircuitSettings) and config.analysis.compare is not None:
            other = local(self._runs / config.analysis.compare)
            if other.parent != self._runs.resolve():
                raise LensError(
                    f"analysis.compare must be the id of a run in {self._runs}, got "
                    f"{config.analysis.compare!r}"
                )
            yield "analysis.compare", str(other)

    def _inside(self, name: str, value: str) -> Path:
        if self._files is None:
            raise LensError(
                f"{name} names a file of this machine: start that run on the command line, or let jobs read "
                "one folder with `lens view --jobs --files FOLDER`"
            )
        path = local(value)
        if not path.is_relative_to(self._files):
            raise LensError(f"{name} must be in {self._files}, got {value!r}")
        return path

    def cancel(self, number: int) -> None:
        """Ask a job to stop.

        Raises:
            LensError: it cannot be.
        """
        self._store.cancel(number)

    def delete(self, run: str) -> int:
        """Delete what a run wrote; how many files of others stay in its folder.

        Raises:
            LensError: no run of this id here, one that cannot be read, or one that is being computed.
        """
        found = [one for one in list_runs(self._runs) if one.id == run]
        if not found:
            raise LensError(f"there is no run {run!r} in {self._runs}")
        if isinstance(found[0], BrokenRun):
            raise LensError(found[0].problem)
        return delete_run(found[0])

    def retry(self, number: int) -> None:
        """Queue a job again; a run goes on where it was left.

        Raises:
            LensError: it cannot be.
        """
        self._store.retry(number)
