"""The comparison report of two runs: one HTML file that opens offline, and the same numbers as JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.common.files import write_text
from lens.runs import Run, compare_runs
from lens_analyses.comparing.numbers import numbers
from lens_analyses.comparing.page import figures, page
from lens_analyses.console import to_json

FOLDER = "comparisons"


@dataclass(frozen=True)
class WrittenComparison:
    """Where a comparison lies, and what it found."""

    html: Path
    json: Path
    numbers: dict[str, Any]

    def text(self) -> str:
        """The sentences, and where the page lies."""
        refusal = [self.numbers["refusal"]] if self.numbers["refusal"] else []
        return "\n".join([*refusal, *self.numbers["summary"], f"comparison: {self.html}"])

    def as_json(self) -> dict[str, Any]:
        """For `--json`: where it lies, and the findings."""
        found = {key: self.numbers[key] for key in ("aligned", "refusal", "shared", "summary")}
        return {"html": str(self.html), "json": str(self.json), **found}


def write_comparison(
    a: Run, b: Run, out: Path, *, command: str, seed: int = 0
) -> WrittenComparison:
    """Compare two runs and write `comparison.html` and `comparison.json` into `out`.

    Raises:
        LensError: as `compare_runs`, or a run is being computed right now.
    """
    for run in (a, b):
        if run.status == "started":
            raise LensError(f"{run.path} is being computed right now; compare it when it is done")
    comparison = compare_runs(a, b, seed=seed)
    data = numbers(comparison, command)
    write_text(out / "comparison.json", to_json(data))
    write_text(out / "comparison.html", page(data, figures(comparison)))
    return WrittenComparison(out / "comparison.html", out / "comparison.json", data)
