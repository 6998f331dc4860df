"""Page `/run/<id>/analysis/<section>`: what one analysis found, as its command wrote it."""

from typing import Any

import pandas as pd
from dash import dcc, html

from lens.common.errors import LensError
from lens.common.head_ids import head_id
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.parts import (
    Cell,
    card,
    crumbs,
    data_table,
    limits,
    named,
    number,
    python_call,
    run_banner,
    section_figure,
)
from lens_dashboards.selection import Selection

MOST_ROWS = 300
_HEADS = ("head", "name", "nearest", "prototype")


def page(library: Library, view: Selection) -> list[Any]:
    """Findings, figures, tables with definitions, limits, and where to get the numbers."""
    run = library.run(view.run)
    section = read_section(run, view.section)
    return [
        crumbs(run, view),
        html.H1(section.title),
        *run_banner(run),
        _others(view, run.sections),
        card(
            html.Ul(
                [html.Li(text, className="found") for text in section.summary], className="findings"
            ),
            "Findings",
        ),
        html.Div(
            [
                card(section_figure(run, section, name, graph_id=f"figure-{name}"))
                for name in section.figures
            ],
            className="halves",
        ),
        *[_table(view, section, name) for name in section.tables],
        limits([section]),
        card(
            python_call(
                "from lens.runs import open_run\n\n"
                f"section = open_run({str(run.path)!r}).section({section.name!r})\n"
                "section.summary, section.columns\n"
                + "\n".join(f"section.tables[{name!r}]" for name in section.tables)
            ),
            "Take it with you",
        ),
    ]


def _others(view: Selection, sections: list[str]) -> html.Nav:
    """Links to the analyses of a run."""
    links: list[Any] = []
    for name in sections:
        words = name.replace("_", " ")
        if name == view.section:
            links.append(html.Span(words, className="current"))
        else:
            links.append(dcc.Link(words, href=view.to("analysis", name).url()))
    return html.Nav(links, className="tabs", **named("Analyses of this run"))


def _table(view: Selection, section: Section, name: str) -> html.Section:
    table = section.tables[name]
    shown = table.head(MOST_ROWS)
    words = name.replace("_", " ")
    names = [str(column) for column in table.columns]
    head = [{"text": name.replace("_", " "), "title": section.columns[name]} for name in names]
    rows = [
        [_cell(view, name, value) for name, value in zip(names, row, strict=True)]
        for row in shown.itertuples(index=False)
    ]
    left = len(table) - len(shown)
    return card(
        [
            data_table(f"{section.title}: {words}", head, rows),
            html.P(
                [
                    f"{len(table)} rows" + (f", {left} of them not shown. " if left else ". "),
                    html.A(
                        f"{name}.csv",
                        href=f"/api/run/{view.run}/section/{section.name}/{name}.csv",
                        download="",
                    ),
                ],
                className="small",
            ),
            html.Details(
                [
                    html.Summary("Definitions of the columns"),
                    html.Dl(
                        [
                            part
                            for column in map(str, table.columns)
                            for part in (
                                html.Dt(column.replace("_", " ")),
                                html.Dd(section.columns[column]),
                            )
                        ]
                    ),
                ]
            ),
        ],
        words.capitalize(),
    )


def _cell(view: Selection, column: str, value: Any) -> Cell:
    """A cell for people; the name of a head leads to its page."""
    if column in _HEADS and isinstance(value, str):
        try:
            found = head_id(value)
        except LensError:
            return value
        return value, view.to_head(*found).url()
    if value is None or value is pd.NA:
        return "–"
    if isinstance(value, float):
        return number(value)
    return str(value)
