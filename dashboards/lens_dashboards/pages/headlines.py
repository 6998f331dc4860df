"""The first screen of a run, or of two: the most surprising findings."""

from typing import Any
from urllib.parse import quote

from dash import dcc, html

from lens.figures.small import strip
from lens.runs.first_screen import PROFILE, Shown
from lens_dashboards.pages.parts import card, named
from lens_dashboards.selection import Selection


def headlines(view: Selection, shown: list[Shown]) -> html.Section:
    """The first screen of a run, or of two beside each other: each finding with interval, baseline and small picture."""
    if not shown:
        text = "Nothing here lies beyond its baseline with its whole interval, or has a baseline."
        return card(html.P(text), "Findings", className="empty", id="headlines")
    items = []
    for number, one in enumerate(shown):
        told = one.headline
        link = view.to("heads") if one.section == PROFILE else view.to("analysis", one.section)
        ends = f" [{_three(told.low)}, {_three(told.high)}]" if told.is_sure else ", no interval"
        drawn = strip(told.value, told.low, told.high, told.baseline, told.against)
        beside = [
            html.Img(
                src=f"data:image/svg+xml,{quote(drawn)}",
                alt=f"{_three(told.value)}{ends}, against {_three(told.baseline)} of {told.against}",
                className="strip",
            ),
            dcc.Link(one.title, href=link.url()) if view.run else html.Span(one.title),
        ]
        parts: list[Any] = [html.Div([html.P(told.text), html.P(beside, className="beside")])]
        if one.picture is not None:
            picture = dcc.Graph(
                figure=one.picture, config={"staticPlot": True}, id=f"picture-{number}"
            )
            parts.append(
                html.Div(picture, className="picture", role="img", **named(f"{one.title}, small"))
            )
        items.append(html.Li(parts))
    note = (
        "The most surprising first: how far the nearer end of the interval lies from the baseline, in units of the "
        "baseline's own scatter. Orange: the value and its 95 % interval; dashed: the baseline."
    )
    return card(
        [html.Ol(items, className="headlines"), html.P(note, className="small")],
        "Findings",
        id="headlines",
    )


def _three(value: float) -> str:
    return f"{value:.3g}"
