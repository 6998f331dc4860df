"""Pieces that all pages share."""

import json
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
from dash import dcc, html

from lens.common.colors import ACCENT
from lens.common.head_ids import head_id
from lens.common.version import __version__
from lens.runs import Comparison, Run
from lens.runs.commands import again
from lens.runs.sections import Section
from lens_dashboards.library import remarks
from lens_dashboards.pages.tabs import tabs
from lens_dashboards.pages.words import coded
from lens_dashboards.selection import Selection

_HEIGHT = 400  # of a figure that names none
_DARK = 0.55  # share of the darkest ground from which letters are white
_FIRST = 8  # sentences that are not folded, shared among analyses
_MENU = {"full": "full screen", "png": "PNG", "svg": "SVG", "csv": "CSV", "json": "JSON"}
_SWITCHED = dict.fromkeys(("overview", "heads", "head", "atlas", "compare"), "First token") | {
    "vision": "Patches that all look at"
}
_VARIANTS = {"raw": "counted (raw)", "sink_excluded": "left out (sink excluded)"}
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
    links = [dcc.Link("All runs", href="/"), f" · run {view.run}" if view.run else ""]
    told = [html.P(coded(text), className="problem"), html.P(links)]
    return card(told, className="error", role="alert")


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
        state, further = "is unfinished", "Complete it"
        if run.status == "started":
            state = "is still running"
            further = (
                "Load the page again for what has come since; if it was broken off, complete it"
            )
        left = " Its analyses are not." if prompts["done"] == prompts["total"] else ""
        banners.append(
            html.Div(
                [
                    f"This run {state}: {prompts['done']} of {prompts['total']} prompts are done."
                    f"{left} {further} with ",
                    html.Code(again(run.path, run.meta)),
                ],
                className="banner partial",
                role="status",
            )
        )
    if run.status == "error" and run.meta["error"]:
        error = run.meta["error"]
        banners.append(
            html.Div(
                f"This run failed: {error['type']}: {error['message']}",
                className="banner failed",
                role="alert",
            )
        )
    banners += [html.Div(text, className="banner partial", role="status") for text in remarks(run)]
    if run.unsupported:
        words = {name.replace("_", " "): reason for name, reason in run.unsupported.items()}
        title = html.Summary(f"Unsupported for this model or its prompts: {', '.join(words)}")
        reasons = html.Ul([html.Li(f"{name}: {reason}") for name, reason in words.items()])
        banners.append(html.Div(html.Details([title, reasons]), className="banner partial"))
    return banners


def crumbs(run: Run, view: Selection) -> html.Div:
    """runs › run › page, the pages of the run, and whether the first token counts."""
    if view.page == "overview":
        return trail(view, html.Span(run.id), pages=[tabs(run, view)])
    last = {
        "head": f"L{view.layer}H{view.head}",
        "analysis": view.section.replace("_", " "),
    }.get(view.page, view.page)
    home = dcc.Link(run.id, href=view.to("overview").url())
    return trail(view, home, html.Span(last), pages=[tabs(run, view)])


def trail(view: Selection, *steps: Any, pages: Iterable[Any] = ()) -> html.Div:
    """runs › step › step with a button that copies the link; then pages, and the switch where it has a meaning."""
    parts: list[Any] = [dcc.Link("runs", href="/")]
    for step in steps:
        parts += [html.Span("›", className="sep"), step]
    parts.append(html.Button("copy link", id="copy-link", className="quiet", type="button"))
    return html.Div(
        [
            html.Nav(parts, className="crumbs", **named("Breadcrumb")),
            html.Div([*pages, *_switch(view)], className="tab-row"),
        ]
    )


def _switch(view: Selection) -> list[html.Div]:
    """Is the first token, or are sinks among patches, counted? The answer is kept in every link; here where it has a meaning."""
    if (what := _SWITCHED.get(view.page)) is None:
        return []
    buttons = [
        html.Button(
            words,
            type="button",
            className="quiet",
            **{"data-variant": variant, "aria-pressed": str(variant == view.variant).lower()},  # pyright: ignore[reportArgumentType]
        )
        for variant, words in _VARIANTS.items()
    ]
    return [
        html.Div(
            [html.Span(what), *buttons],
            className="switch",
            role="group",
            **named(what),
        )
    ]


def graph(
    graph_id: str | dict[str, str], figure: go.Figure, label: str, python: str = ""
) -> html.Div:
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
            remember(name, value),
        ],
        className="control",
    )


def names_control(option: str, label: str, value: str) -> html.Div:
    """A line of names with commas that keeps an option of the page in its link."""
    return html.Div(
        [
            html.Label(label, htmlFor=f'{{"option":"{option}"}}'),
            dcc.Input(id={"option": option}, value=value, type="text", debounce=True),
            remember(option, value),
        ],
        className="control",
    )


def remember(option: str, value: Any) -> dcc.Store:
    """What a control of an option shows at first: only another value changes the link."""
    return dcc.Store(id={"shown": option}, data=value)


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


def limits(sections: Iterable[Section | Comparison]) -> html.Section:
    """What these analyses do not show."""
    items = [html.Li(text) for section in sections for text in section.limits]
    return card(html.Ul(items), "What this does not show")


def figure_code(run: Run, section: str, figure: str) -> str:
    """Python that has a figure of an analysis, and its numbers, again."""
    return (
        "from lens.runs import open_run\n\n"
        f"section = open_run({str(run.path)!r}).section({section!r})\n"
        f"section.tables\nsection.figures[{figure!r}]"
    )


def section_figure(
    run: Run,
    section: Section,
    name: str,
    *,
    graph_id: str = "",
    figure: go.Figure | None = None,
) -> html.Div:
    """A figure of an analysis, or a marked copy of it, with its menu and its Python."""
    return graph(
        graph_id or f"{section.name}-{name}",
        section.figures[name] if figure is None else figure,
        f"{section.title}: {name.replace('_', ' ')}",
        figure_code(run, section.name, name),
    )


def marked(figure: go.Figure, x: float, y: float, name: str) -> go.Figure:
    """A copy of a curve with a ring around the point that the page shows."""
    ring = {"size": 16, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": ACCENT}}
    found = go.Figure(figure)
    found.add_scatter(x=[x], y=[y], mode="markers", marker=ring, name=name, hoverinfo="skip")
    return found


def link_points(figure: go.Figure, link: Callable[[int, int], str]) -> go.Figure:
    """Give every cell of a grid of heads, or every point that is named as a head, its link."""
    for trace in figure.data:
        points: Any = trace
        if points.type == "heatmap":
            points.customdata = [[link(layer, head) for head in points.x] for layer in points.y]
        else:
            points.customdata = [link(*head_id(name)) for name in points.text]
    return figure


def choice(
    view: Selection, option: str, known: Iterable[str], default: str, notes: list[str]
) -> str:
    """The option of a link, or the default and a note where it is not one of those known here."""
    value = view.option(option)
    if not value or value in known:
        return value or default
    notes.append(f"This run has no {option} {value!r}; {default or 'none'} is shown.")
    return default


Cell = str | tuple[str, str] | tuple[str, str, str]
"""What a cell says, then where it leads ("" for nowhere) and its title."""


def data_table(
    label: str,
    head: Iterable[str | Mapping[str, str]],
    rows: Iterable[Iterable[Cell]],
    *,
    marked: Collection[int] = (),
    row_heads: bool = False,
    className: str = "scroll tall",
) -> html.Div:
    """A table of many rows, which `table.js` draws.

    Args:
        label: what it holds, for those who cannot see it.
        head: words of each column, or `text` with `title`, `link` and `sort` (ascending, descending).
        rows: their cells.
        marked: numbers of rows that stand out.
        row_heads: whether the first cell of a row names it.
        className: of the region around it.
    """
    content = {
        "head": [{"text": one} if isinstance(one, str) else dict(one) for one in head],
        "rows": [
            {"cells": list(cells), "marked": number in marked} for number, cells in enumerate(rows)
        ],
        "rowHeads": row_heads,
    }
    return html.Div(
        className=className,
        tabIndex=0,
        role="region",
        **{"data-table": json.dumps(content), **named(label)},  # pyright: ignore[reportArgumentType]
    )


def shade(share: float) -> dict[str, str]:
    """The ground of a token by its share of what the darkest holds, and letters that can be read on it."""
    letters = "white" if share > _DARK else "inherit"
    return {"backgroundColor": f"rgba(53, 95, 141, {share:.3f})", "color": letters}


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


def between(low: float, high: float) -> str:
    """An interval for a table; a dash where there is none."""
    return number(low) if low != low else f"{number(low)} to {number(high)}"
