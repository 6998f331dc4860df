"""The page frame and its callbacks: read the link, render the page, keep the link true."""

import logging
import time
from collections.abc import Callable
from typing import Any

from dash import ALL, MATCH, ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from lens.common.errors import LensError
from lens_dashboards.library import Library
from lens_dashboards.pages import (
    analysis,
    atlas,
    circuits,
    compare,
    head,
    heads,
    jobs,
    maps,
    mixers,
    overview,
    patching,
    policies,
    provenance,
    reading,
    redistribution,
    runs,
    sinks,
    vision,
)
from lens_dashboards.pages.parts import card, error_card, fault_card, note_banner
from lens_dashboards.selection import Selection, read_url

_LOG = logging.getLogger(__name__)
_Part = Callable[[Library, Selection], list[Any]]
RENDER = {
    "runs": runs.page,
    "jobs": jobs.page,
    "overview": overview.page,
    "head": head.page,
    "maps": maps.page,
    "atlas": atlas.page,
    "heads": heads.page,
    "sinks": sinks.page,
    "redistribution": redistribution.page,
    "policies": policies.page,
    "mixers": mixers.page,
    "patching": patching.page,
    "circuits": circuits.page,
    "compare": compare.page,
    "reading": reading.page,
    "vision": vision.page,
    "analysis": analysis.page,
    "provenance": provenance.page,
}


def register(app: Dash, library: Library) -> None:
    """Give the app its layout and callbacks."""
    app.layout = html.Div(
        [
            dcc.Location(id="url", refresh="callback-nav"),
            dcc.Store(id="go-to"),
            dcc.Store(id="gone-to"),
            dcc.Store(id="chosen"),
            html.Header(
                [
                    dcc.Link("attention-lens", href="/", className="brand"),
                    html.Span("what every attention head does", className="tagline"),
                    dcc.Link("jobs", href="/jobs", className="to-jobs"),
                ],
                className="top",
            ),
            html.Main(html.Div(id="page", className="page"), id="main"),
        ],
        id="frame",
    )

    jobs.register(app)

    @app.callback(Output("page", "children"), Input("url", "pathname"), Input("url", "search"))
    def show(path: str | None, search: str | None) -> list[Any]:
        return render(library, path or "/", search or "")

    app.clientside_callback(
        ClientsideFunction("lens", "openPoint"),
        Output("go-to", "data"),
        Input({"points": ALL}, "clickData"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("lens", "follow"),
        Output("gone-to", "data"),
        Input("go-to", "data"),
        prevent_initial_call=True,
    )

    app.clientside_callback(
        ClientsideFunction("lens", "choose"),
        Output("chosen", "data"),
        Input({"option": ALL}, "value"),
        State({"option": ALL}, "id"),
        State({"shown": ALL}, "data"),
        State({"shown": ALL}, "id"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("go-to", "data", allow_duplicate=True),
        Input("chosen", "data"),
        State("url", "pathname"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def choose(chosen: dict[str, Any], path: str, search: str) -> Any:
        """Keep what was chosen on a page in its link; the page is then drawn from the link."""
        view, _ = read_url(path, search or "")
        if view is None:
            return no_update
        after = view.where(**{name: _words(value) for name, value in chosen.items()})
        return no_update if after == view else _step(after)

    app.clientside_callback(
        ClientsideFunction("lens", "chooseEdges"),
        Output({"option": "edges"}, "value"),
        Input("edge-slider", "value"),
        State("edge-steps", "data"),
        State({"option": "edges"}, "value"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("loaded-circuit", "children"),
        Input("circuit-file", "contents"),
        State("circuit-file", "filename"),
        State("circuit-run", "data"),
        prevent_initial_call=True,
    )
    def load_circuit(contents: str | None, name: str, run_id: str) -> Any:
        return circuits.loaded(library, run_id, contents, name) if contents else no_update

    @app.callback(
        Output("go-to", "data", allow_duplicate=True),
        Output("group-problem", "children"),
        Input("make-group", "n_clicks"),
        State("group-name", "value"),
        State("url", "pathname"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def make_group(clicks: int | None, name: str | None, path: str, search: str) -> Any:
        """The pinned nodes as a group of the link."""
        view, _ = read_url(path, search or "")
        if not clicks or view is None:
            return no_update, no_update
        try:
            groups = circuits.grouped(library, view, name or "")
        except LensError as error:
            return no_update, str(error)
        return _step(view.where(groups=groups, pins="")), ""

    app.clientside_callback(
        ClientsideFunction("lens", "mountMap"),
        Output({"map-mounted": MATCH}, "data"),
        Input({"map-config": MATCH}, "data"),
    )

    @app.callback(
        Output({"curves": MATCH}, "children"),
        Input({"map-mounted": MATCH}, "data"),
        prevent_initial_call=True,
    )
    def draw_curves(link: str) -> Any:
        """The curves below a map, when it is drawn and stays; an answer for a head that is left finds no place."""
        path, _, search = link.partition("?")
        view, _notes = read_url(path, search)
        if view is None or view.page != "head":
            return no_update
        return _shown(head.curves, library, view, path, html.H2)

    app.clientside_callback(
        ClientsideFunction("lens", "mountMaps"),
        Output("maps-mounted", "data"),
        Input("maps-config", "data"),
    )
    app.clientside_callback(
        ClientsideFunction("lens", "mountAtlas"),
        Output("atlas-mounted", "data"),
        Input("atlas-config", "data"),
    )
    app.clientside_callback(
        ClientsideFunction("lens", "mountVision"),
        Output("vision-mounted", "data"),
        Input("vision-config", "data"),
    )


def _step(view: Selection) -> dict[str, Any]:
    """Where to go; no two steps are equal, so that each is taken."""
    return {"link": view.url(), "at": time.monotonic_ns()}


def _words(value: Any) -> str:
    """The value of a control as a link holds it."""
    if isinstance(value, list):
        return "-".join(map(str, value))
    return "" if value is None else str(value)


def render(library: Library, path: str, search: str) -> list[Any]:
    """The page of a link; whatever goes wrong is a card that says so."""
    view, notes = read_url(path, search)
    if view is None:
        return [
            html.H1("No such page"),
            card(
                [
                    html.P(f"{path} is no page of this dashboard."),
                    dcc.Link("All runs", href="/"),
                ]
            ),
        ]
    address = f"{path}?{search.lstrip('?')}"
    return [*map(note_banner, notes), *_shown(RENDER[view.page], library, view, address)]


def _shown(
    part: _Part, library: Library, view: Selection, address: str, level: Any = html.H1
) -> list[Any]:
    try:
        return part(library, view)
    except LensError as error:
        return [level("This cannot be shown"), error_card(str(error), view)]
    except Exception as fault:  # at the edge: a fault of this program is shown, and logged whole
        _LOG.exception("page %s failed", address)
        return [level("This page failed"), fault_card(fault, address)]
