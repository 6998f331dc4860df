"""The numbers of a comparison: `comparison.json` (docs/schema/comparison.md). The page is made from them."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

import lens
from lens.runs import Comparison, Run
from lens.runs.comparison.two_runs import DEFINITIONS
from lens.runs.first_screen import Shown
from lens.traces.metrics import METRICS
from lens_analyses.console import finite
from lens_analyses.report.numbers import CITATION, headline, plain

SCHEMA, SCHEMA_VERSION = "attention-lens/comparison", 1


def numbers(comparison: Comparison, shown: Sequence[Shown], command: str) -> dict[str, Any]:
    """Everything that the comparison says, as plain values without NaN; `shown` on its first screen."""
    data = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "a": _run(comparison.a),
        "b": _run(comparison.b),
        "aligned": comparison.aligned,
        "refusal": comparison.refusal or None,
        "shared": dict(comparison.shared),
        "headlines": [headline(one) for one in shown],
        "summary": list(comparison.sentences),
        "settings": _rows(comparison.settings),
        "losses": _rows(comparison.losses),
        "metrics": _rows(comparison.metrics),
        "heads": _rows(comparison.heads),
        "circuits": _rows(comparison.circuits),
        "sections": _sections(comparison),
        "limits": list(comparison.limits),
        "definitions": {
            **DEFINITIONS,
            **{
                name: METRICS[name].definition
                for name in dict.fromkeys(comparison.metrics["metric"])
            },
        },
        "provenance": {
            "command": command,
            "seed": comparison.seed,
            "report_version": lens.__version__,
            "citation": CITATION,
        },
    }
    return finite(plain(data))


def _run(run: Run) -> dict[str, Any]:
    keys = ("title", "what", "created", "model", "prompts", "command", "versions")
    return {"run": run.id, "status": run.status, **{key: run.meta.get(key) for key in keys}}


def _sections(comparison: Comparison) -> list[dict[str, Any]]:
    """Each section that both runs have: what either found, and the columns beside each other."""
    table = comparison.sections
    return [
        {
            "name": name,
            "title": title,
            "a": list(first),
            "b": list(second),
            "columns": _rows(table[table["section"] == name].drop(columns="section")),
        }
        for name, (title, first, second) in comparison.summaries.items()
    ]


def _rows(table: pd.DataFrame) -> list[dict[Any, Any]]:
    return table.to_dict("records")
