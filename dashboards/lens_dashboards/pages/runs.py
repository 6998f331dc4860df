"""Page `/`: what was computed, and can it be trusted?"""

from typing import Any

from dash import dcc, html

from lens.common.errors import LensError
from lens.runs import BrokenRun, Run
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import card, chip, named, number
from lens_dashboards.selection import Selection

_COLUMNS = (
    *("Run", "Status", "Analysis", "Model", "Heads", "Prompts"),
    *("Tokens", "Created", "Seconds", "Compare"),
)
PART = 50
"""Runs that the page shows at once."""


def page(library: Library, view: Selection) -> list[Any]:
    """The table of runs, or what to do when there is none."""
    try:
        runs = library.runs()
    except LensError as error:
        return [html.H1("Runs"), _empty(str(error))]
    if not runs:
        return [html.H1("Runs"), _empty(f"The folder {library.folder} holds no run yet.")]
    parts = -(-len(runs) // PART)
    part = min(max(int(view.option("part")), 1), parts)
    shown = runs[(part - 1) * PART : part * PART]
    rows = [_broken_row(run) if isinstance(run, BrokenRun) else _row(run) for run in shown]
    table = html.Table(
        [html.Thead(html.Tr([html.Th(name, scope="col") for name in _COLUMNS])), html.Tbody(rows)],
        className="runs",
    )
    whole = sum(run.status == "success" for run in runs)
    return [
        html.H1("Runs"),
        html.P(
            [
                f"{len(runs)} in {library.folder}, {whole} complete. ",
                *([dcc.Link("Compare two", href="/compare")] if len(runs) > 1 else []),
            ],
            className="lead",
        ),
        card(html.Div(table, className="scroll", tabIndex=0, role="region", **named("Runs"))),
        *([_steps(view, part, parts)] if parts > 1 else []),
    ]


def _steps(view: Selection, part: int, parts: int) -> html.Nav:
    """Links to the newer and the older runs."""
    near = {"newer": part - 1, "older": part + 1}
    links = [
        [dcc.Link(name, href=view.where(part=str(to)).url()), " "]
        for name, to in near.items()
        if 1 <= to <= parts
    ]
    words = f"part {part} of {parts}, {PART} runs each. "
    return html.Nav([words, *(piece for link in links for piece in link)], **named("Parts"))


def _row(run: Run) -> html.Tr:
    meta, model, prompts = run.meta, run.meta["model"], run.meta["prompts"]
    return html.Tr(
        [
            html.Td(
                [
                    dcc.Link(meta["title"], href=f"/run/{run.id}"),
                    html.Div(run.id, className="small"),
                ]
            ),
            html.Td(chip(run.status)),
            html.Td(meta["what"]),
            html.Td(model["name"]),
            html.Td(f"{model.get('layers', '?')} × {model.get('heads', '?')}"),
            html.Td(f"{prompts['done']} of {prompts['total']}"),
            html.Td(number(prompts.get("tokens")), className="number"),
            html.Td(meta["created"].replace("T", " ")[:16]),
            html.Td(number(meta.get("seconds"), 3), className="number"),
            html.Td(
                dcc.Link(
                    "compare",
                    href=Selection(page="compare").where(a=run.id).url(),
                    title=f"compare {run.id} with another run",
                )
            ),
        ]
    )


def _broken_row(run: BrokenRun) -> html.Tr:
    return html.Tr(
        [
            html.Td(run.id),
            html.Td(chip("error")),
            html.Td(run.problem, colSpan=len(_COLUMNS) - 2, className="problem"),
        ]
    )


def _empty(reason: str) -> html.Section:
    return card(
        [
            html.P(reason),
            html.P("Make one, then reload this page:"),
            html.Pre(html.Code("lens demo --no-view\nlens run --text-name moby-dick --tokens 128")),
        ],
        "Nothing here yet",
        className="empty",
    )
