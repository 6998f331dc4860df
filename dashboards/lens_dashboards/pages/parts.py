"""Pieces that all pages share."""

import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
from dash import dcc, html

from lens import __version__
from lens.runs import Run
from lens.sections import Section
from lens_dashboards.selection import Selection

_HEIGHT = 400  # of a figure that names none
_FIRST = 8  # sentences that are not folded, shared among analyses
_MENU = {"full": "full screen", "png": "PNG", "svg": "SVG", "csv": "CSV", "json": "JSON"}
_TABS = {
    "overview": "Overview",
    "heads": "Heads",
    "atlas": "Atlas",
    "sinks": "Sinks",
    "redistribution": "Redistribution",
    "circuits": "Circuits",
    "provenance": "Provenance",
}
STATUS_WORDS = {
    "success": "complete",
    "started": "running",
    "partial": "unfinished",
    "error": "failed",
}


def card(children: Any, title: str | None = None, **more: Any) -> html.Section:
    """A panel with an optional heading."""
    heading = [] if title is None else [html.H2(title)]
    body = children if isinstance(children, list) else [children]
    return html.Section([*heading, *body], className=f"card {more.pop('className', '')}", **more)


def named(label: str) -> dict[str, Any]:
    """The accessible name of a component, to be spread into its arguments."""
    return {"aria-label": label}


def chip(status: str) -> html.Span:
    """The status of a run, in a word and a colour."""
    return html.Span(STATUS_WORDS.get(status, status), className=f"chip {status}")


def note_banner(text: str) -> html.Div:
    """A line above the page about something in the link that could not be used."""
    return html.Div(text, className="banner note", role="status")


def error_card(text: str, view: Selection) -> html.Section:
    """What went wrong and what to do, instead of a blank page."""
    return card(
        [
            html.P(text, className="problem"),
            html.P(
                [
                    dcc.Link("All runs", href="/"),
                    *([f" · run {view.run}"] if view.run else []),
                ]
            ),
        ],
        className="error",
        role="alert",
    )


def fault_card(fault: Exception, link: str) -> html.Section:
    """A fault of this program: details to copy into a report of it."""
    place = traceback.extract_tb(fault.__traceback__)[-1]
    details = (
        f"attention-lens {__version__}\npage {link}\n{type(fault).__name__}: {fault}\n"
        f"{place.name}, line {place.lineno}"
    )
    return card(
        [
            html.P(
                "Something in the dashboard went wrong; the run itself is not changed. "
                "The details below help to find it, and the server's log has all of them.",
                className="problem",
            ),
            html.Div(
                [
                    html.Pre(html.Code(details)),
                    html.Button("copy details", className="quiet copy-code", type="button"),
                ]
            ),
            html.P(dcc.Link("All runs", href="/")),
        ],
        className="error",
        role="alert",
    )


def run_banner(run: Run) -> list[html.Div]:
    """Amber or red lines about a run that is not whole, and its warnings."""
    prompts = run.meta["prompts"]
    banners = []
    if run.status in ("partial", "started"):
        state = "is still running" if run.status == "started" else "is unfinished"
        banners.append(
            html.Div(
                [
                    f"This run {state}: {prompts['done']} of {prompts['total']} prompts are done. ",
                    "Complete it with ",
                    html.Code(f"lens run -c {run.path.name}/config.toml"),
                ],
                className="banner partial",
                role="status",
            )
        )
    if run.status == "error" and run.meta.get("error"):
        error = run.meta["error"]
        banners.append(
            html.Div(
                f"This run failed: {error['type']}: {error['message']}",
                className="banner failed",
                role="alert",
            )
        )
    banners += [
        html.Div(text, className="banner partial", role="status")
        for text in run.meta.get("warnings", [])
    ]
    return banners


def crumbs(run: Run, view: Selection) -> html.Div:
    """runs › run › page, and the pages of the run."""
    parts: list[Any] = [dcc.Link("runs", href="/"), html.Span("›", className="sep")]
    if view.page == "overview":
        parts.append(html.Span(run.id))
    else:
        last = {
            "head": f"L{view.layer}H{view.head}",
            "analysis": view.section.replace("_", " "),
        }.get(view.page, view.page)
        parts += [
            dcc.Link(run.id, href=f"/run/{run.id}"),
            html.Span("›", className="sep"),
            html.Span(last),
        ]
    parts.append(html.Button("copy link", id="copy-link", className="quiet", type="button"))
    return html.Div([html.Nav(parts, className="crumbs", **named("Breadcrumb")), tabs(run, view)])


def graph(graph_id: str, figure: go.Figure, label: str, python: str = "") -> html.Div:
    """A plotly figure with a text alternative and a menu: full screen, pictures, numbers, Python.

    Args:
        graph_id: of the component, and of what is downloaded.
        figure: with its own height, or 400 pixels.
        label: what it shows, for those who cannot see it.
        python: the call that makes it again.
    """
    buttons = [
        html.Button(words, type="button", className="quiet", **{"data-figure": kind})  # pyright: ignore[reportArgumentType]
        for kind, words in _MENU.items()
    ]
    parts: list[Any] = [
        dcc.Graph(
            id=graph_id,
            figure=figure,
            responsive=True,
            style={"height": f"{figure.layout.height or _HEIGHT}px"},  # pyright: ignore[reportAttributeAccessIssue]
            config={"displayModeBar": False, "displaylogo": False},
        ),
        html.Div(buttons, className="figure-menu", role="group", **named(f"Menu: {label}")),
    ]
    if python:
        parts.append(python_call(python))
    return html.Div(parts, className="figure", role="group", **named(label))


def select(name: str, label: str, options: Mapping[str, str], value: str) -> html.Div:
    """A dropdown that keeps an option of the page in its link; values -> words."""
    return html.Div(
        [
            html.Label(label, htmlFor=f'{{"option":"{name}"}}'),
            dcc.Dropdown(
                id={"option": name},
                options=[{"value": key, "label": words} for key, words in options.items()],
                value=value,
                clearable=False,
            ),
        ],
        className="control",
    )


def tabs(run: Run, view: Selection) -> html.Nav:
    """Links to the pages of a run."""
    links: list[Any] = []
    for page, words in _TABS.items():
        if page == view.page:
            links.append(html.Span(words, className="current", **{"aria-current": "page"}))  # pyright: ignore[reportArgumentType]
        else:
            links.append(dcc.Link(words, href=Selection(page=page, run=run.id).url()))
    return html.Nav(links, className="tabs pages", **named("Pages of this run"))


def findings(sections: Iterable[Section]) -> html.Section:
    """The first sentences of each analysis, and the rest folded."""
    lists: list[list[str]] = [[], []]
    shown = list(sections)
    first_of_each = max(1, _FIRST // max(1, len(shown)))
    for section in shown:
        lists[0] += section.summary[:first_of_each]
        lists[1] += section.summary[first_of_each:]
    first, rest = (
        html.Ul([html.Li(text, className="found") for text in texts], className="findings")
        for texts in lists
    )
    more = [html.Details([html.Summary(f"{len(lists[1])} more findings"), rest])] * bool(lists[1])
    return card([first, *more], "Findings")


def missing(run: Run, what: str, command: str) -> html.Section:
    """Instead of a figure that the run has nothing for: which command makes it."""
    model = run.meta["model"]["name"]
    return card(
        [
            html.P(f"This run has no {what}. Make a run that has:"),
            html.Pre(html.Code(command.format(model=model))),
        ],
        className="empty",
    )


def python_call(code: str) -> html.Details:
    """The call that makes the same numbers in a notebook."""
    return html.Details(
        [
            html.Summary("Python"),
            html.Pre(html.Code(code)),
            html.Button("copy", className="quiet copy-code", type="button"),
        ],
        className="python",
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for NaN."""
    if value is None or value != value:
        return "–"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
