"""Page `/run/<id>/atlas`: what patterns exist? Every head as a small picture."""

from typing import Any

from dash import dcc, html

from lens.errors import LensError
from lens.figures.colors import VIRIDIS
from lens_dashboards.library import Library
from lens_dashboards.pages.head import prompt_control
from lens_dashboards.pages.parts import card, crumbs, python_call, run_banner
from lens_dashboards.selection import Selection


def page(library: Library, view: Selection) -> list[Any]:
    """The canvas of all heads with its prompt selector."""
    run = library.run(view.run)
    traces = run.traces
    if not traces:
        raise LensError(
            f"run {run.id} has no finished trace; complete it: lens run -c {run.path / 'config.toml'}"
        )
    notes: list[Any] = []
    prompt = view.prompt or traces[0]
    if prompt not in traces:
        text = f"This run has no trace of prompt {prompt!r}; {traces[0]} is shown."
        notes.append(html.Div(text, className="banner note", role="status"))
        prompt = traces[0]
    trace = library.trace(run.id, prompt)
    config = {"run": run.id, "prompt": prompt, "palette": list(VIRIDIS)}
    return [
        crumbs(run, view),
        html.H1(f"{trace.layers * trace.heads} heads of {trace.model}"),
        *run_banner(run),
        *notes,
        dcc.Store(id="atlas-config", data=config),
        dcc.Store(id="atlas-mounted"),
        dcc.Store(id="prompt-shown", data=prompt),
        prompt_control(run, traces, prompt),
        card(
            [
                html.Div(id="atlas", className="atlas"),
                html.P(
                    "Layers go down, heads across; in each picture queries go down and keys across, colours "
                    "are logarithmic. Click a head to open it; with the atlas in focus the arrow keys move "
                    "and Enter opens.",
                    className="small",
                ),
            ],
            "Attention of every head",
        ),
        card(
            python_call(
                "from lens.runs import open_run\n\n"
                f"trace = open_run({str(run.path)!r}).trace({prompt!r})\n"
                "trace.block_mass  # layer, head, query_block, key_block"
            ),
            "Take it with you",
        ),
    ]
