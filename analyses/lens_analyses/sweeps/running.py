"""`lens sweep`: make each run of a plan, go on after a failure, and write down what came of it.

The state of a run is its own folder, so a killed sweep continues with the same command; `sweep.json`
beside the page only lists the runs and the reasons of those that failed.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.common.files import write_json, write_text
from lens.runs import Run, open_run
from lens.runs.writer import find_by_config
from lens_analyses.config import RunConfig
from lens_analyses.console import ERROR, OK, PARTIAL, Output, finite, log, one_line
from lens_analyses.inputs import read_sources
from lens_analyses.runner import execute
from lens_analyses.sweeps.headlines import headline, summary
from lens_analyses.sweeps.index import index_page
from lens_analyses.sweeps.plan import SweepPlan

FOLDER = "sweeps"
SCHEMA, SCHEMA_VERSION = "attention-lens/sweep", 1


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


@dataclass(frozen=True)
class Sweep:
    """A sweep so far.

    Attributes:
        plan: what was asked for.
        folder: of `index.html` and `sweep.json`.
        items: one for each run of the plan.
        command: that continues it.
    """

    plan: SweepPlan
    folder: Path
    items: tuple[Item, ...]
    command: str

    @property
    def exit_code(self) -> int:
        """0: all done; 1: every one failed; 3: some failed or are left."""
        states = {item.status for item in self.items}
        return OK if states == {"success"} else ERROR if states == {"error"} else PARTIAL

    def text(self) -> str:
        """What was done, what failed and why, and where the page lies."""
        done = [item for item in self.items if item.status == "success"]
        reused = sum(not item.computed for item in done)
        found = f" ({reused} of them finished before)" if reused else ""
        lines = [f"{len(done)} of {len(self.items)} runs are done{found}"]
        lines += [
            f"failed: {item.config.command()}: {item.error}" for item in self.items if item.error
        ]
        if self.exit_code != OK:
            lines.append(f"the same command continues: {self.command}")
        return "\n".join([*lines, f"index: {self.folder / 'index.html'}"])

    def as_json(self) -> dict[str, Any]:
        """Contents of `sweep.json` (docs/schema/sweep.md)."""
        return finite(
            {
                "schema": SCHEMA,
                "schema_version": SCHEMA_VERSION,
                "title": self.plan.title,
                "folder": str(self.folder),
                "command": self.command,
                "runs": [item.as_json(self.folder) for item in self.items],
            }
        )

    def save(self) -> None:
        """Write `sweep.json` and `index.html`."""
        data = self.as_json()
        write_json(self.folder / "sweep.json", data)
        write_text(self.folder / "index.html", index_page(data))


def run_sweep(
    plan: SweepPlan, runs: Path, output: Output, *, command: str, again: bool = False
) -> Sweep:
    """Make every run that is not finished; a failure is written down and the next one made.

    Args:
        plan: of `read_plan`.
        runs: folder of run folders; the page comes into `sweeps/<name>/` in it.
        output: of the command.
        command: that continues the sweep, for the page.
        again: compute anew what is finished.
    """
    items = tuple(Item(config) for config in plan.runs)
    sweep = Sweep(plan, (runs / FOLDER / plan.name).resolve(), items, command)
    sweep.save()
    for number, item in enumerate(items):
        log.info("run %d of %d: %s", number + 1, len(items), item.config.command())
        made = _make(item, runs, output, again=again)
        done = (*sweep.items[:number], made, *sweep.items[number + 1 :])
        sweep = replace(sweep, items=done)
        sweep.save()
        if made.status == "partial" and not made.error:  # stopped on request
            break
    return sweep


def _make(item: Item, runs: Path, output: Output, *, again: bool) -> Item:
    started = time.monotonic()
    with _failure(item, runs) as failed:
        finished = execute(item.config, runs, output, again=again)
        item = replace(item, status=finished.status, run=finished.run, computed=finished.computed)
        failed.update(error=(finished.run.meta["error"] or {}).get("message", ""))
    return replace(item, **failed, seconds=time.monotonic() - started)


@contextmanager
def _failure(item: Item, runs: Path) -> Iterator[dict[str, Any]]:
    """What to change in the item after an exception; empty without one."""
    failed: dict[str, Any] = {}
    try:
        yield failed
    except KeyboardInterrupt:
        failed["status"] = "partial"
    except Exception as error:  # one run's failure, whatever it is, does not end the others
        reason = str(error) if isinstance(error, LensError) else f"{type(error).__name__}: {error}"
        failed.update(status="error", error=one_line(reason), run=_folder(item.config, runs))
        log.info("failed: %s", failed["error"])


def _folder(config: RunConfig, runs: Path) -> Run | None:
    """The folder that a failed run left, if it can be read."""
    try:
        found = find_by_config(runs, read_sources(config)[0].as_mapping())
        return None if found is None else open_run(found)
    except LensError:
        return None
