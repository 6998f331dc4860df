"""The page of a series of runs: `series.html`, which opens offline, and the same numbers as `series.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lens
from lens.common.files import write_text
from lens.common.results import of_kind
from lens.figures.style import untemplated
from lens.runs import Run
from lens.runs.comparison.headlines import of_series
from lens.runs.comparison.pictures import first_token_curves, series_lines
from lens.runs.comparison.series import RunSeries, compare_series
from lens.runs.comparison.words import MATCHED
from lens.runs.first_screen import Shown
from lens.traces.metrics import METRICS
from lens_analyses.comparison.page import choices, largest, rendered
from lens_analyses.comparison.written import Written, check_done
from lens_analyses.console import finite, to_json
from lens_analyses.report.charts import pictures, slim
from lens_analyses.report.numbers import CITATION, headline, plain

SCHEMA, SCHEMA_VERSION = "attention-lens/series", 1
MOST_ROWS = 60


@untemplated()
def write_series(runs: Sequence[Run], out: Path, *, command: str, seed: int = 0) -> Written:
    """Compare runs in their order and write `series.html` and `series.json` into `out`.

    Raises:
        LensError: as `compare_series`, or a run is being computed right now.
    """
    check_done(runs)
    series = compare_series(runs, seed=seed)
    shown = of_series(series)
    data = _numbers(series, shown, command)
    write_text(out / "series.json", to_json(data))
    write_text(out / "series.html", _page(series, data, pictures(shown)))
    told = ("headlines", "summary", "limits")
    return Written(out / "series.html", out / "series.json", "series", data, told)


def _numbers(series: RunSeries, shown: Sequence[Shown], command: str) -> dict[str, Any]:
    pairs = zip(series.names, series.runs, strict=True)
    data = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "runs": [{"name": name, "run": run.id, "status": run.status} for name, run in pairs],
        "headlines": [headline(one) for one in shown],
        "summary": list(of_kind(series.findings(), "heads", "sinks", "jump")),
        "limits": [
            *of_kind(series.findings(), "limit"),
            MATCHED,
            "Runs stand in the order in which they were given, at equal distances.",
        ],
        "heads": series.heads.to_dict("records"),
        "sinks": series.sinks.to_dict("records"),
        "losses": series.losses.to_dict("records"),
        "provenance": {
            "command": command,
            "seed": series.seed,
            "report_version": lens.__version__,
            "citation": CITATION,
        },
    }
    return finite(plain(data))


def _page(series: RunSeries, data: dict[str, Any], small: dict[str, Any]) -> str:
    drawn = _figures(series)
    return rendered(
        "series",
        data,
        drawn | small,
        choices=choices(name for name in drawn if name.startswith("scatter/")),
        first_token="first_token" in drawn,
        largest=largest(
            (row for row in data["heads"] if row["variant"] == "raw"),
            *("since_last", "since_last_low", "since_last_high"),
            MOST_ROWS,
        ),
        labels={name: one.label for name, one in METRICS.items()},
    )


def _figures(series: RunSeries) -> dict[str, Any]:
    """`scatter/<prompts>/<metric>/<variant>` of every score that has a number, and `first_token`."""
    known = series.heads.dropna(subset=["value"])
    known = known[known["metric"].map(lambda name: METRICS[str(name)].unit) != "position"]
    kinds = known[["prompts", "metric", "variant"]].drop_duplicates().itertuples(index=False)
    figures = {
        f"scatter/{kind.prompts}/{kind.metric}/{kind.variant}": slim(
            series_lines(
                series, str(kind.metric), str(kind.variant), str(kind.prompts), height=420
            ).to_plotly_json()
        )
        for kind in kinds
    }
    if len(series.sinks):
        figures["first_token"] = slim(first_token_curves(series, height=380).to_plotly_json())
    return figures
