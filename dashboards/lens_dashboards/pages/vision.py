"""Page `/run/<id>/vision`: where does a patch look, and who looks at it?"""

from typing import Any
from urllib.parse import quote, urlencode

from dash import dcc, html

from lens.common.colors import VIRIDIS
from lens.common.errors import LensError
from lens.traces.pictures import grids_of
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.head import known_prompt, prompt_control
from lens_dashboards.pages.parts import (
    card,
    choice,
    crumbs,
    note_banner,
    python_call,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection

_SECTIONS = ("overlays", "rings", "structure", "chain")


def page(library: Library, view: Selection) -> list[Any]:
    """Two pictures under one patch, and links to what the analyses of pictures found."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1("What was looked at"), *run_banner(run)]
    traces = [name for name in run.traces if _has_picture(library, run.id, name)]
    if not traces:
        return [
            *top,
            card(
                html.P(
                    [
                        "This run has no picture: ",
                        html.Code("lens vision --model dinov2-small --image cat.png"),
                        " makes one.",
                    ]
                ),
                "No picture",
                className="empty",
            ),
        ]
    notes: list[str] = []
    prompt = known_prompt(view, traces, notes)
    trace = library.trace(run.id, prompt)
    layers = [f"L{layer}" for layer in trace.layers]
    names = [*layers, *map(str, trace.every_head)]
    shown = choice(view, "map", names, layers[-1], notes)
    grid = grids_of(trace.attrs)[0]
    variant = view.variant
    base = f"/api/run/{quote(run.id, safe='')}"
    config = {
        "picture": f"{base}/picture/{prompt}.png",
        "look": f"{base}/look/{prompt}",
        "query": urlencode({"heads": shown, "variant": variant}),
        "size": list(grid.size),
        "box": list(grid.box),
        "height": grid.height,
        "width": grid.width,
        "patch": [grid.height // 2, grid.width // 2],
        "palette": list(VIRIDIS),
    }
    call = (
        "from lens.runs import open_run\n\n"
        f"trace = open_run({str(run.path)!r}).trace({prompt!r})\n"
        f"trace.overlay({shown!r}, query=({grid.height // 2}, {grid.width // 2}), variant={variant!r}).plot()"
    )
    held = sections(run)
    links = [
        html.Li(dcc.Link(held[name].title, href=view.to("analysis", name).url()))
        for name in _SECTIONS
        if name in held
    ]
    return [
        *top,
        *map(note_banner, notes),
        dcc.Store(id="vision-config", data=config),
        dcc.Store(id="vision-mounted"),
        prompt_control(run, traces, prompt),
        html.Div(
            select("map", "Heads", {name: name for name in names}, shown), className="controls"
        ),
        card(
            html.Div(
                [
                    html.Div(
                        [
                            _canvas("Where the patch looks"),
                            _canvas("Who looks at the patch"),
                        ],
                        className="halves",
                    ),
                    html.P("Loading …", className="look-said", **{"aria-live": "polite"}),  # pyright: ignore[reportArgumentType]
                    html.P(
                        "Move over a picture to choose the patch, or use the arrow keys with a picture in focus. "
                        "Colours are shares of the highest value of each picture; a head's name is its layer and "
                        "number, a layer's the mean of its heads.",
                        className="small",
                    ),
                ],
                id="vision",
                className="vision",
            ),
            f"{shown} on {prompt}",
        ),
        *([card(html.Ul(links), "Analyses of pictures")] if links else []),
        card(python_call(call), "Take it with you"),
    ]


def _canvas(name: str) -> html.Div:
    look: dict[str, Any] = {"aria-label": f"{name}, on the picture", "role": "img"}
    return html.Div([html.H3(name), html.Canvas(tabIndex=0, **look)], className="look")


def _has_picture(library: Library, run_id: str, prompt: str) -> bool:
    try:
        grids_of(library.trace(run_id, prompt).attrs)
    except LensError:
        return False
    return True
