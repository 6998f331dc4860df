"""Page `/run/<id>/analysis/<section>`: what one analysis found, as its command wrote it."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from dash import dcc, html

from lens.errors import LensError
from lens.head_ids import head_id
from lens.runs import Run
from lens.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.parts import (
    card,
    crumbs,
    graph,
    named,
    number,
    python_call,
    run_banner,
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
        others(run.id, run.sections, section.name),
        card(
            html.Ul(
                [html.Li(text, className="found") for text in section.summary], className="findings"
            ),
            "Findings",
        ),
        html.Div(
            [
                card(
                    graph(
                        f"figure-{name}",
                        figure,
                        f"{section.title}: {name.replace('_', ' ')}",
                        figure_code(run, section.name, name),
                    )
                )
                for name, figure in section.figures.items()
            ],
            className="halves",
        ),
        *[_table(run.id, section, name) for name in section.tables],
        card(html.Ul([html.Li(text) for text in section.limits]), "What this does not show"),
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


def others(run_id: str, sections: list[str], current: str = "") -> html.Nav:
    """Links to the analyses of a run."""
    links: list[Any] = []
    for name in sections:
        words = name.replace("_", " ")
        if name == current:
            links.append(html.Span(words, className="current"))
        else:
            target = Selection(page="analysis", run=run_id, section=name)
            links.append(dcc.Link(words, href=target.url()))
    return html.Nav(links, className="tabs", **named("Analyses of this run"))


def figure_code(run: Run, section: str, figure: str) -> str:
    """Python that has a figure of an analysis, and its numbers, again."""
    return (
        "from lens.runs import open_run\n\n"
        f"section = open_run({str(run.path)!r}).section({section!r})\n"
        f"section.tables\nsection.figures[{figure!r}]"
    )


def tables_of(run: Run, sections: Iterable[str]) -> html.Section:
    """Links to the whole of each analysis, with what its tables hold."""
    items = []
    for name in sections:
        if name in run.sections:
            section = read_section(run, name)
            target = Selection(page="analysis", run=run.id, section=name)
            tables = ", ".join(
                f"{words.replace('_', ' ')} ({len(table):,} rows)"
                for words, table in section.tables.items()
            )
            items.append(html.Li([dcc.Link(section.title, href=target.url()), f": {tables}"]))
    return card(html.Ul(items), "Tables, and more figures")


def _table(run_id: str, section: Section, name: str) -> html.Section:
    table = section.tables[name]
    shown = table.head(MOST_ROWS)
    words = name.replace("_", " ")
    heading = html.Thead(
        html.Tr(
            [
                html.Th(
                    str(column).replace("_", " "), scope="col", title=section.columns[str(column)]
                )
                for column in table.columns
            ]
        )
    )
    rows = [
        html.Tr(
            [
                html.Td(_cell(run_id, str(column), value))
                for column, value in zip(table.columns, row, strict=True)
            ]
        )
        for row in shown.itertuples(index=False)
    ]
    left = len(table) - len(shown)
    return card(
        [
            html.Div(
                html.Table([heading, html.Tbody(rows)]),
                className="scroll tall",
                tabIndex=0,
                role="region",
                **named(f"{section.title}: {words}"),
            ),
            html.P(
                [
                    f"{len(table)} rows" + (f", {left} of them not shown. " if left else ". "),
                    html.A(
                        f"{name}.csv",
                        href=f"/api/run/{run_id}/section/{section.name}/{name}.csv",
                        download=f"{section.name}-{name}.csv",
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


def _cell(run_id: str, column: str, value: Any) -> Any:
    """A cell for people; the name of a head leads to its page."""
    if column in _HEADS and isinstance(value, str):
        try:
            found = head_id(value)
        except LensError:
            return value
        target = Selection(page="head", run=run_id, layer=found.layer, head=found.head)
        return dcc.Link(value, href=target.url())
    if value is None or value is pd.NA:
        return "–"
    if isinstance(value, float):
        return number(value)
    return str(value)
