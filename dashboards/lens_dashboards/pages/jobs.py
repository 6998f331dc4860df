"""Page `/jobs`: start an analysis and follow it; `jobs.js` draws it from `/api/jobs`."""

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, dcc, html

from lens_dashboards.job_routes import READ_ONLY
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import card, named
from lens_dashboards.pages.words import coded
from lens_dashboards.selection import Selection


def page(library: Library, view: Selection) -> list[Any]:
    """Places for the form, the queue and the log; without a desk the reason, and nothing asks the server."""
    if not library.starts_jobs:
        told = html.Div(coded(READ_ONLY), className="banner partial")
        return [html.H1("Jobs"), html.Div(told, id="jobs-notice", role="status")]
    return [
        html.H1("Jobs"),
        html.P(
            "Analyses are computed by worker processes, one after the other; this page only watches.",
            className="lead",
        ),
        html.Div(id="jobs-notice", role="status"),
        html.Div(
            [
                card(html.Div(id="jobs-form"), "New analysis", className="jobs-new"),
                html.Div(
                    [
                        card(
                            [
                                html.Div(
                                    "Loading …",
                                    id="jobs-list",
                                    className="scroll",
                                    tabIndex=0,
                                    role="region",
                                    **named("Queue"),
                                )
                            ],
                            "Queue",
                            className="jobs-queue",
                        ),
                        html.Div(id="jobs-log"),
                    ]
                ),
            ],
            className="jobs",
        ),
        dcc.Store(id="jobs-config", data={"folder": str(library.folder)}),
        dcc.Store(id="jobs-mounted"),
    ]


def register(app: Dash) -> None:
    """Draw the page when it is there."""
    app.clientside_callback(
        ClientsideFunction("lensJobs", "mount"),
        Output("jobs-mounted", "data"),
        Input("jobs-config", "data"),
    )
