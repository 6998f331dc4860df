"""One run of a sweep: made, or the reason why it failed."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.runs import Run, open_run
from lens.runs.writer import find_by_config
from lens_analyses.config import RunConfig
from lens_analyses.console import Output, log, one_line
from lens_analyses.inputs import read_sources
from lens_analyses.runner import execute
from lens_analyses.sweeps.headlines import headline, summary


@dataclass(frozen=True)
class Item:
    """One run of a sweep.

    Attributes:
        config: its configuration.
        status: `pending`, `success`, `partial` or `error`.
        run: its folder, once there is one.
        computed: whether this command computed it, rather than found it finished.
        seconds: that this command spent on it.
        error: why it failed, "" otherwise.
    """

    config: RunConfig
    status: str = "pending"
    run: Run | None = None
    computed: bool = False
    seconds: float = 0.0
    error: str = ""

    def as_json(self, folder: Path) -> dict[str, Any]:
        """For `sweep.json` in `folder`."""
        config, run = self.config, self.run
        report = None if run is None else run.path / "report.html"
        done = run if self.status == "success" else None
        return {
            "model": config.model.name,
            "what": config.what,
            "task": getattr(config.analysis, "task", None),
            "status": self.status,
            "run": None if run is None else run.id,
            "report": os.path.relpath(report, folder) if report and report.exists() else None,
            "computed": self.computed,
            "seconds": round(self.seconds, 3),
            "error": self.error or None,
            "headline": None if done is None else headline(done),
            "summary": [] if done is None else summary(done),
            "command": config.command(),
        }


def make(item: Item, runs: Path, output: Output, *, again: bool) -> Item:
    """The item after its run; an exception is its failure and not raised."""
    started = time.monotonic()
    changed: dict[str, Any]
    try:
        finished = execute(item.config, runs, output, again=again)
        changed = {
            "status": finished.status,
            "run": finished.run,
            "computed": finished.computed,
            "error": (finished.error or {}).get("message", ""),
        }
    except KeyboardInterrupt:
        changed = {"status": "partial"}
    except Exception as error:  # one run's failure, whatever it is, does not end the others
        reason = str(error) if isinstance(error, LensError) else f"{type(error).__name__}: {error}"
        reason = one_line(reason)
        changed = {"status": "error", "error": reason, "run": folder_of(item.config, runs)}
        log.info("failed: %s", reason)
    return replace(item, **changed, seconds=time.monotonic() - started)


def folder_of(config: RunConfig, runs: Path) -> Run | None:
    """The folder that a failed or stopped run left, if it can be read."""
    try:
        found = find_by_config(runs, read_sources(config)[0].as_mapping())
        return None if found is None else open_run(found)
    except LensError:
        return None
