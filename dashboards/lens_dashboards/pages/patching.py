"""Page `/run/<id>/patching`: where the answer is carried, layer by token."""

from typing import Any

from dash import html

from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import (
    Cell,
    between,
    card,
    choice,
    data_table,
    number,
    section_figure,
    select,
)
from lens_dashboards.pages.section_page import section_page
from lens_dashboards.selection import Selection

_WORDS = {
    "residual": "residual stream",
    "attention": "attention",
    "mlp": "MLPs",
    "heads": "single heads",
}
_MOST = 12  # places that are listed


def page(library: Library, view: Selection) -> list[Any]:
    """The map of one stream, and its strongest places."""
    return section_page(
        library,
        view,
        _cards,
        title="Patching by position",
        names=("patching",),
        missed=("patching by position", "patch"),
    )


def _cards(
    run: Run, view: Selection, known: dict[str, Section], notes: list[str]
) -> list[html.Section]:
    found = known["patching"]
    streams = {name: words for name, words in _WORDS.items() if name in found.figures}
    stream = choice(view, "stream", streams, next(iter(streams)), notes)
    table = found.tables["effects"]
    rows = table[(table["stream"] == stream).to_numpy()].head(_MOST)
    lines: list[list[Cell]] = [
        [
            str(row["node"]),
            str(row["position"]),
            number(row["effect"]),
            number(row["change"]),
            between(row["change_low"], row["change_high"]),
        ]
        for row in rows.to_dict("records")
    ]
    columns = (
        "Node",
        "Token",
        {"text": "Share", "title": found.columns["effect"]},
        {"text": "Change", "title": found.columns["change"]},
        "95 % interval",
    )
    said = {name.replace("_", " "): value for name, value in found.configuration.items()}
    return [
        card(
            [
                html.Div([select("stream", "Patched", streams, stream)], className="controls"),
                section_figure(run, found, stream),
                html.P(
                    "; ".join(f"{name}: {value}" for name, value in said.items()), className="small"
                ),
            ],
            "Layer by token",
        ),
        card(
            data_table(f"Strongest places of {streams[stream]}", columns, lines, row_heads=True),
            "Strongest places",
        ),
    ]
