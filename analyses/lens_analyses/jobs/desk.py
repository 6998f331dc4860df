"""What the dashboard may ask of the queue: `lens_dashboards` gets this object and imports nothing of us."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens_analyses.config import CircuitSettings, RunConfig, load_config
from lens_analyses.config.models import is_task_file
from lens_analyses.jobs.form import form
from lens_analyses.jobs.store import JobStore


class JobDesk:
    """Submit, list, cancel and retry; every configuration is checked before it is queued."""

    def __init__(self, runs: Path) -> None:
        self._store = JobStore(runs)
        self._runs = runs

    def form(self) -> list[dict[str, Any]]:
        """Settings of a new analysis; see `lens_analyses.jobs.form`."""
        return form()

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
            LensError: as `load_config`, an unknown kind, or a setting that names a file.
        """
        config = load_config(None, {k: v for k, v in settings.items() if v is not None})
        config = self._without_files(config)
        return self._store.submit(kind, config.as_mapping(), config.command())

    def _without_files(self, config: RunConfig) -> RunConfig:
        """The same; looks at what the settings came to, however they were written.

        Raises:
            LensError: a file of this machine, or a run to compare with that is not in the folder of runs.
        """
        for name, one in config.settings().items():
            if one.shown.file and config.value(name) is not None:
                raise LensError(
                    f"{name} names a file of this machine: start that run on the command line"
                )
        if is_task_file(getattr(config.analysis, "task", "")):
            raise LensError(
                "a task from a file is started on the command line: lens heads --task FILE"
            )
        if not isinstance(config.analysis, CircuitSettings) or config.analysis.compare is None:
            return config
        other = (self._runs / config.analysis.compare).resolve()
        if other.parent != self._runs.resolve():
            raise LensError(
                f"analysis.compare must be the id of a run in {self._runs}, got "
                f"{config.analysis.compare!r}"
            )
        analysis = config.analysis.model_copy(update={"compare": str(other)})
        return config.model_copy(update={"analysis": analysis})

    def cancel(self, number: int) -> None:
        """Ask a job to stop.

        Raises:
            LensError: it cannot be.
        """
        self._store.cancel(number)

    def retry(self, number: int) -> None:
        """Queue a job again; a run goes on where it was left.

        Raises:
            LensError: it cannot be.
        """
        self._store.retry(number)
