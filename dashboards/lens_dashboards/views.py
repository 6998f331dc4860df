"""The page frame and its callbacks: read the link, render the page, keep the link true."""

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from lens.errors import LensError
from lens_dashboards.library import Library
from lens_dashboards.pages import analysis, atlas, head, jobs, overview, provenance, runs
from lens_dashboards.pages.parts import card, error_card, note_banner
from lens_dashboards.selection import Selection, read_url

RENDER = {
    "runs": runs.page,
    "jobs": jobs.page,
    "overview": overview.page,
    "head": head.page,
    "atlas": atlas.page,
    "analysis": analysis.page,
    "provenance": provenance.page,
}


def register(app: Dash, library: Library) -> None:
    """Give the app its layout and callbacks."""
    app.layout = html.Div(
        [
            dcc.Location(id="url", refresh="callback-nav"),
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

    @app.callback(
        Output("grid", "figure"),
        Output("by-layer", "figure"),
        Output("findings", "children"),
        Output("strongest", "children"),
        Output("metric-definition", "children"),
        Input("metric", "value"),
        Input("variant", "value"),
        Input("group", "value"),
        State("run-id", "data"),
    )
    def draw(metric: str, variant: str, group: str, run_id: str) -> tuple[Any, ...]:
        view = Selection("overview", run_id, group, metric, variant)
        return overview.figures(library.run(run_id), view)

    app.clientside_callback(
        ClientsideFunction("lens", "keepOverviewLink"),
        Output("overview-link", "data"),
        Input("metric", "value"),
        Input("variant", "value"),
        Input("group", "value"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("lens", "openHead"),
        Output("url", "href"),
        Input("grid", "clickData"),
        State("run-id", "data"),
        State("group", "value"),
        State("prompts-of-groups", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("lens", "mountMap"),
        Output("map-mounted", "data"),
        Input("map-config", "data"),
    )
    app.clientside_callback(
        ClientsideFunction("lens", "mountAtlas"),
        Output("atlas-mounted", "data"),
        Input("atlas-config", "data"),
    )

    @app.callback(
        Output("url", "search"),
        Input("prompt", "value"),
        State("prompt-shown", "data"),
        prevent_initial_call=True,
    )
    def choose_prompt(prompt: str, shown: str) -> Any:
        return no_update if prompt == shown else f"?prompt={prompt}"


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
    try:
        return [*map(note_banner, notes), *RENDER[view.page](library, view)]
    except LensError as error:
        return [html.H1("This cannot be shown"), error_card(str(error), view)]
