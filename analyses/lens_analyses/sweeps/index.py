"""`index.html` of a sweep: one table of all runs, with links to their reports. Needs no network."""

from typing import Any

from markupsafe import Markup

import lens
from lens_analyses.report.page import environment, source_of
from lens_analyses.sweeps.headlines import LABELS

WORDS = {
    "success": "done",
    "error": "failed",
    "partial": "stopped",
    "pending": "to do",
}


def index_page(data: dict[str, Any]) -> str:
    """The page of the contents of `sweep.json`."""
    made = environment()
    shown = {
        name: label
        for name, label in LABELS.items()
        if any((run["headline"] or {}).get(name) is not None for run in data["runs"])
    }
    return made.get_template("sweep.html.j2").render(
        sweep=data,
        labels=shown,
        words=WORDS,
        version=lens.__version__,
        style=Markup(source_of(made, "report.css")),
    )
