"""`lens sweep`: make each run of a plan, go on after a failure, and write down what came of it.

The state of a run is its own folder, so a killed sweep continues with the same command; `sweep.json`
beside the page only lists the runs and the reasons of those that failed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens.common.files import write_json, write_text
from lens_analyses.console import ERROR, OK, PARTIAL, Output, finite, log
from lens_analyses.options import Engine
from lens_analyses.sweeps.index import index_page
from lens_analyses.sweeps.making import Item, make
from lens_analyses.sweeps.on_ray import on_ray
from lens_analyses.sweeps.plan import SweepPlan

FOLDER = "sweeps"
SCHEMA, SCHEMA_VERSION = "attention-lens/sweep", 1


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
    plan: SweepPlan,
    runs: Path,
    output: Output,
    *,
    command: str,
    again: bool = False,
    engine: Engine = "local",
) -> Sweep:
    """Make every run that is not finished; a failure is written down and the next one made.

    Args:
        plan: of `read_plan`.
        runs: folder of run folders; the page comes into `sweeps/<name>/` in it.
        output: of the command.
        command: that continues the sweep, for the page.
        again: compute anew what is finished.
        engine: `local`, one run after the other in this process, or `ray`, each a task (`on_ray`).
    """
    made = {"local": _in_turn, "ray": on_ray}[engine]
    items = tuple(Item(config) for config in plan.runs)
    sweep = Sweep(plan, (runs / FOLDER / plan.name).resolve(), items, command)
    sweep.save()
    for number, item in made(items, runs, output, again=again):
        done = (*sweep.items[:number], item, *sweep.items[number + 1 :])
        sweep = replace(sweep, items=done)
        sweep.save()
    return sweep


def _in_turn(
    items: Sequence[Item], runs: Path, output: Output, *, again: bool
) -> Iterator[tuple[int, Item]]:
    """One after the other in this process, until one is stopped on request."""
    for number, item in enumerate(items):
        log.info("run %d of %d: %s", number + 1, len(items), item.config.command())
        made = make(item, runs, output, again=again)
        yield number, made
        if made.status == "partial" and not made.error:
            return
