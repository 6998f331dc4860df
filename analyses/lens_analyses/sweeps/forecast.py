"""`lens sweep --dry-run`: which runs are to come, and about what they take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.writer import find_by_config
from lens_analyses.config import RunConfig
from lens_analyses.estimate import Estimate, estimate
from lens_analyses.inputs import read_sources
from lens_analyses.sweeps.plan import SweepPlan


@dataclass(frozen=True)
class Expected:
    """One run: finished, to come with an estimate, or impossible for a reason."""

    config: RunConfig
    finished: bool = False
    estimate: Estimate | None = None
    problem: str = ""

    def text(self) -> str:
        """One line."""
        words = self.problem or "finished before"
        if self.estimate is not None:
            words = "; ".join(self.estimate.text().splitlines()[1:])
        return f"{self.config.command()}\n    {words}"


@dataclass(frozen=True)
class Forecast:
    """What a sweep would do."""

    title: str
    runs: tuple[Expected, ...]

    def text(self) -> str:
        """Two lines a run, then how many."""
        finished = sum(run.finished for run in self.runs)
        impossible = sum(bool(run.problem) for run in self.runs)
        last = f"{len(self.runs)} runs: {finished} finished, {impossible} cannot be made"
        return "\n".join([*(run.text() for run in self.runs), last])

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "title": self.title,
            "runs": [
                {
                    "command": run.config.command(),
                    "finished": run.finished,
                    "estimate": None if run.estimate is None else run.estimate.as_json(),
                    "problem": run.problem or None,
                }
                for run in self.runs
            ],
        }


def forecast(plan: SweepPlan, runs: Path) -> Forecast:
    """Check every run of the plan as it would be checked, and estimate it; writes nothing."""
    return Forecast(plan.title, tuple(_expect(config, runs) for config in plan.runs))


def _expect(config: RunConfig, runs: Path) -> Expected:
    try:
        found = find_by_config(runs, read_sources(config)[0].as_mapping())
        if found is not None and open_run(found).status == "success":
            return Expected(config, finished=True)
        return Expected(config, estimate=estimate(config))
    except LensError as error:
        return Expected(config, problem=str(error))
