"""What a page shows instead of what its run has not got: the command that makes it, and with jobs a button."""

import json
from typing import Any

from dash import html

from lens.common.errors import LensError
from lens.runs import Run
from lens.runs.commands import analysis, settings
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import card
from lens_dashboards.pages.words import coded

WORDS = {
    "heads": "what each head does, which matter, which are alike and which may go",
    "sinks": "where attention is parked, why, and whether it matters",
    "redistribute": "what changes when attention is moved",
    "policies": "which heads may be sparse, how far, and what it costs",
    "patch": "where the answer is carried, layer by token",
    "circuit": "which edges between heads carry a task",
    "explain": "why heads attend where they do",
}
"""Analysis -> what it finds."""


def missing(library: Library, run: Run, what: str, command: str) -> html.Section:
    """Instead of a figure that the run has nothing for.

    Args:
        library: whether jobs can be started from its pages.
        run: the run without it.
        what: is missing, in words.
        command: the analysis that makes it, such as "sinks".
    """
    return card(
        [html.P(f"This run has no {what}."), *step(library, run, command)], className="empty"
    )


def next_steps(library: Library, run: Run) -> html.Section:
    """Every analysis that could follow, for a run that has none."""
    parts: list[Any] = [
        html.P("No analysis beyond the profile yet. On the same model and prompts:")
    ]
    for command, words in WORDS.items():
        parts += [html.H3(words.capitalize()), *step(library, run, command)]
    return card(parts, "Analyses", className="empty")


def step(library: Library, run: Run, command: str) -> list[Any]:
    """The command of an analysis of the run's own model and prompts; with jobs, a button that starts it."""
    try:
        config = run.config
        line, given = analysis(run.path, config, command), settings(config, command)
    except LensError as reason:
        return [html.P(coded(f"{reason}."), className="small")]
    parts: list[Any] = [html.Pre(html.Code(line))]
    if library.starts_jobs:
        button = html.Button(
            f"Run lens {command} here",
            type="button",
            className="primary start-job",
            **{"data-job": json.dumps({"kind": "run", "settings": given})},  # pyright: ignore[reportArgumentType]
        )
        parts.append(html.P([button, html.Span(className="job-problem", role="alert")]))
    return parts
