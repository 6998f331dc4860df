"""Page `/run/<id>/atlas`: what patterns exist? Every head as a small picture."""

from typing import Any

from dash import dcc, html

from lens.common.colors import VIRIDIS
from lens_dashboards.atlas import no_form
from lens_dashboards.library import Library
from lens_dashboards.pages.head import finished_traces, known_prompt, prompt_control
from lens_dashboards.pages.parts import card, crumbs, note_banner, python_call, run_banner
from lens_dashboards.selection import Selection


def page(library: Library, view: Selection) -> list[Any]:
    """The canvas of all heads with its prompt selector."""
    run = library.run(view.run)
    traces = finished_traces(run)
    notes: list[str] = []
    prompt = known_prompt(view, traces, notes)
    trace = library.trace(run.id, prompt)
    if view.variant != "raw" and (why := no_form(trace)):
        notes.append(why)
    config = {
        "run": run.id,
        "prompt": prompt,
        "variant": view.variant,
        "palette": list(VIRIDIS),
    }
    return [
        crumbs(run, view),
        html.H1(
            f"{len(trace.layers) * trace.heads} heads of {trace.model}"
            f"{f' ({trace.part})' * bool(trace.part)}"
        ),
        *run_banner(run),
        *map(note_banner, notes),
        dcc.Store(id="atlas-config", data=config),
        dcc.Store(id="atlas-mounted"),
        prompt_control(run, traces, prompt),
        card(
            [
                html.Div("Loading …", id="atlas", className="atlas"),
                html.P(
                    "Layers go down, heads across; in each picture queries"
                    f"{' of the target' * trace.cross} go down and keys{' of the source' * trace.cross} across, colours "
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
