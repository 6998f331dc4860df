"""The runs that the dashboard shows: opened by id, kept while they do not change."""

import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from lens.common.errors import LensError
from lens.runs import BrokenRun, Run, find_run, open_run
from lens.runs.folders import INDEX, listed
from lens.runs.sections import FOLDER, Section
from lens.runs.sections import INDEX as SECTION_INDEX
from lens.traces.trace import AttentionTrace
from lens_dashboards.atlas import atlas

_OPEN_TRACES = 16
_OPEN_ATLASES = 8  # of at most 4 MiB
_OPEN_SECTIONS = 64


def sections(run: Run) -> dict[str, Section]:
    """The sections of a run that can be read, by name; why others cannot is in `remarks`."""
    return run.readable(section)[0]


def remarks(run: Run) -> list[str]:
    """Warnings of a run, and what does not fit the schema and is left out."""
    return [*run.meta["warnings"], *run.damage, *run.readable(section)[1]]


def section(run: Run, name: str) -> Section:
    """A section of a run, kept while its index does not change: copy its figures to add to them.

    Raises:
        LensError: as `Run.section`.
    """
    if name not in run.sections:
        return run.section(name)  # says so; a name that was made up is no part of a path
    index = run.path / FOLDER / name / SECTION_INDEX
    return _section(run, run.path, name, index.stat().st_mtime_ns if index.exists() else 0)


@lru_cache(_OPEN_SECTIONS)
def _section(run: Run, path: Path, name: str, changed: int) -> Section:
    return run.section(name)


class Library:
    """A folder of runs; a run that changes on disk is read again. `starts_jobs`: whether its pages may start analyses."""

    def __init__(self, folder: str | Path, starts_jobs: bool = False) -> None:
        self.folder, self.starts_jobs = Path(folder), starts_jobs
        self._finished: dict[Path, tuple[tuple[int, int], Run]] = {}
        self._open: dict[str, tuple[int, Run]] = {}
        self._trace = lru_cache(_OPEN_TRACES)(self._load_trace)
        self._atlas = lru_cache(_OPEN_ATLASES)(atlas)

    def runs(self) -> list[Run | BrokenRun]:
        """All runs, newest first; of those that are finished and did not change nothing is read again."""
        return listed(self.folder, self._opened)

    def read_ahead(self) -> None:
        """Read all runs in a thread: who opens the page of runs later does not wait for it."""

        def read() -> None:
            with suppress(LensError, OSError):  # the page says so
                self.runs()

        threading.Thread(target=read, daemon=True).start()

    def _opened(self, folder: Path) -> Run:
        index = (folder / INDEX).lstat()
        state = index.st_mtime_ns, index.st_size
        kept = self._finished.get(folder)
        if kept is None or kept[0] != state:
            run = open_run(folder)
            if run.status != "success":
                self._finished.pop(folder, None)
                return run
            kept = self._finished[folder] = state, run
        return kept[1]

    def run(self, run_id: str) -> Run:
        """One run.

        Raises:
            LensError: there is none of this id, or it cannot be read.
        """
        run = find_run(self.folder, run_id)
        changed = (run.path / INDEX).stat().st_mtime_ns
        kept = self._open.get(run_id)
        if kept is None or kept[0] != changed:
            self._open[run_id] = (changed, run)
        return self._open[run_id][1]

    def trace(self, run_id: str, prompt: str) -> AttentionTrace:
        """The trace of one prompt; arrays are read when they are used.

        Raises:
            LensError: there is none, or it is damaged.
        """
        run = self.run(run_id)
        return self._trace(run_id, prompt, self._open[run_id][0], run)

    def atlas(self, run_id: str, prompt: str, variant: str = "raw") -> np.ndarray:
        """A small picture of every head of a trace; see `lens_dashboards.atlas`.

        Raises:
            LensError: as `trace`.
        """
        return self._atlas(self.trace(run_id, prompt), variant)

    @staticmethod
    def _load_trace(run_id: str, prompt: str, changed: int, run: Run) -> AttentionTrace:
        return run.trace(prompt)
