"""The comparison report of two runs: one HTML file that opens offline, and the same numbers as JSON."""

from pathlib import Path

from lens.common.files import write_text
from lens.figures.style import untemplated
from lens.runs import Run, compare_runs
from lens.runs.comparison.headlines import of_comparison
from lens_analyses.comparison.numbers import numbers
from lens_analyses.comparison.page import figures, page
from lens_analyses.comparison.written import Written, check_done
from lens_analyses.console import to_json
from lens_analyses.report.charts import pictures

FOLDER = "comparisons"


@untemplated()
def write_comparison(a: Run, b: Run, out: Path, *, command: str, seed: int = 0) -> Written:
    """Compare two runs and write `comparison.html` and `comparison.json` into `out`.

    Raises:
        LensError: as `compare_runs`, or a run is being computed right now.
    """
    check_done((a, b))
    comparison = compare_runs(a, b, seed=seed)
    shown = of_comparison(comparison)
    data = numbers(comparison, shown, command)
    write_text(out / "comparison.json", to_json(data))
    write_text(out / "comparison.html", page(data, figures(comparison) | pictures(shown)))
    told = ("aligned", "refusal", "shared", "headlines", "summary")
    return Written(out / "comparison.html", out / "comparison.json", "comparison", data, told)
