"""Page `/run/<id>/head/<layer>/<head>`: what does this head do?"""

import json
from dataclasses import replace
from typing import Any

from dash import dcc, html

from lens import figures as draw
from lens.common.errors import LensError
from lens.runs import Run
from lens.runs.commands import again
from lens.runs.schema import PROMPT_KINDS
from lens.traces.metrics import METRICS
from lens.traces.trace import AttentionTrace
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.cross import map_card, strips
from lens_dashboards.pages.examples import examples_card
from lens_dashboards.pages.next_steps import missing
from lens_dashboards.pages.overview import NOT_ATTENDING
from lens_dashboards.pages.parts import (
    Cell,
    between,
    card,
    crumbs,
    data_table,
    graph,
    named,
    note_banner,
    number,
    python_call,
    run_banner,
    select,
)
from lens_dashboards.raster import MOST_CELLS, of_head
from lens_dashboards.selection import Selection


def page(library: Library, view: Selection) -> list[Any]:
    """The block map, the token strip, the head's curves and its scores."""
    run = library.run(view.run)
    traces = finished_traces(run)
    notes: list[str] = []
    prompt = known_prompt(view, traces, notes)
    trace = library.trace(run.id, prompt)
    layer, head = view.layer, view.head
    name = str(trace.head_id((layer, head)))
    code = _trace_code(run, prompt)
    shown = f"{run.id} {prompt} {name} {view.variant}"
    if trace.cross:
        attention, below = map_card(view, trace, code), strips(view, trace, prompt, code, notes)
        mounted = []
    else:
        attention = _map_card(run, prompt, trace, layer, head)
        below = [card(html.Div(id="strip", className="strip"), "Tokens")]
        config = map_config(view, run, prompt, trace, name)
        mounted = [
            dcc.Store(id={"map-config": shown}, data=config),
            dcc.Store(id={"map-mounted": shown}),
        ]
    return [
        crumbs(run, view),
        html.Div(
            [
                html.H1(f"{name} of {trace.model}{f' ({trace.part})' * bool(trace.part)}"),
                _steps(run, view, prompt, trace),
            ],
            className="title-row",
        ),
        *run_banner(run),
        *map(note_banner, notes),
        *mounted,
        prompt_control(run, traces, prompt),
        html.Div(
            [
                attention,
                html.Div(
                    [
                        *_effect(library, run, view, name),
                        card(_scores(run, prompt, (layer, head), view.variant), "Scores"),
                    ],
                    className="side",
                ),
            ],
            className="columns",
        ),
        *below,
        *examples_card(run, view, name, notes),
        *_pinned(library, run, view, trace, prompt),
        *(
            _curves(run, view, trace, prompt)
            if trace.cross
            else [html.Div(id={"curves": shown}, className="curves")]
        ),
    ]


def curves(library: Library, view: Selection) -> list[Any]:
    """What stands below a map: three figures, which are made and drawn when the map is there and stays."""
    run = library.run(view.run)
    prompt = known_prompt(view, run.traces, [])
    return _curves(run, view, library.trace(run.id, prompt), prompt)


def map_config(
    view: Selection, run: Run, prompt: str, trace: AttentionTrace, name: str
) -> dict[str, Any]:
    """What the script that draws a head's map is told."""
    return {
        "run": run.id,
        "made": run.meta.get("updated") or run.meta["created"],
        "prompt": prompt,
        "window": view.window,
        "query": view.query,
        "variant": view.variant,
        **of_head(trace, *trace.head_id(name)),
    }


def _map_card(run: Run, prompt: str, trace: AttentionTrace, layer: int, head: int) -> html.Section:
    """The map that zooms to single tokens."""
    return card(
        [
            html.Div(id="map", className="map"),
            html.P(
                "Wheel zooms with Ctrl or after a click, drag pans, double click shows everything; with the map in "
                "focus the arrow keys move, + and - zoom. Click a row to shade its keys "
                "below.",
                className="small",
            ),
            html.P(_sharpness(trace, layer, head), className="small"),
            python_call(
                f"{_trace_code(run, prompt)}"
                f"trace.tile({layer}, {head}, (0, trace.length), (0, trace.length))  # tokens\n"
                f"trace.block_mass.sel(layer={layer}, head={head})\n"
                f"figures.block_map(trace, {layer}, {head})"
            ),
        ],
        "Attention",
        className="wide",
    )


def _trace_code(run: Run, prompt: str) -> str:
    return (
        "from lens import figures\nfrom lens.runs import open_run\n\n"
        f"trace = open_run({str(run.path)!r}).trace({prompt!r})\n"
    )


def _curves(run: Run, view: Selection, trace: AttentionTrace, prompt: str) -> list[Any]:
    """Attention by distance and by key, and the entropy of each row."""
    name = f"L{view.layer}H{view.head}"
    curves = (
        ("distance", draw.distance_profile, f"Attention of {name} by distance", "How far it looks"),
        (
            "received",
            draw.received_mass,
            f"Mass that each key receives in {name}",
            "What it looks at",
        ),
        ("entropy", draw.row_entropy, f"Row entropy of {name}", "How spread it is"),
    )
    counted = (
        "Distance and received mass have no sink-excluded form: they count the first token. Entropy is "
        "drawn both ways."
    )
    return [
        *([html.P(counted, className="small", id="no-form")] if view.variant != "raw" else []),
        html.Div(
            [
                card(
                    graph(
                        graph_id,
                        make(trace, view.layer, view.head, height=300),
                        label,
                        f"{_trace_code(run, prompt)}figures.{make.__name__}"
                        f"(trace, {view.layer}, {view.head})",
                    ),
                    title,
                )
                for graph_id, make, label, title in (curves[1:] if trace.cross else curves)
            ],
            className="thirds",
        ),
    ]


def _sharpness(trace: AttentionTrace, layer: int, head: int) -> str:
    if refusal := trace.tile_refusal(layer, head):
        return f"Blocks are the sharpest here: {refusal}."
    return (
        f"Zoomed in to {MOST_CELLS} tokens or fewer, the map shows exact probabilities of single "
        "tokens."
    )


def _effect(library: Library, run: Run, view: Selection, name: str) -> list[Any]:
    """What the model loses without this head, beside the picture of its attention."""
    section = sections(run).get("importance")
    if section is None and run.meta["model"].get("part"):
        return []  # of encoder-decoders no command measures it
    if section is None:
        return [missing(library, run, "effect of this head", "heads")]
    table = section.tables["scores"]
    rows = table[(table["name"] == name).to_numpy()].select_dtypes("number").to_dict("records")
    row = rows[0] if rows else {}
    measures = [str(column) for column in row if {f"{column}_low", f"{column}_high"} <= set(row)]
    target = view.to("analysis", "importance")
    lines: list[list[Cell]] = [
        [
            (measure, "", section.columns[measure]),
            number(float(row[measure])),
            between(float(row[f"{measure}_low"]), float(row[f"{measure}_high"])),
        ]
        for measure in measures
    ]
    return [
        card(
            [
                data_table(
                    f"Effect of {name}",
                    ("Measure", "Value", "95 % interval"),
                    lines,
                    row_heads=True,
                    className="scroll facts-table",
                ),
                html.P(
                    [
                        "Positive: the task goes worse without it. ",
                        dcc.Link("All heads", href=target.url()),
                    ],
                    className="small",
                ),
            ],
            f"Effect of {name}",
        )
    ]


def _steps(run: Run, view: Selection, prompt: str, trace: AttentionTrace) -> html.Nav:
    """Links to the heads around this one."""
    layers, heads = trace.layers, trace.heads
    index = layers.index(view.layer) * heads + view.head
    targets = (
        ("‹ previous head", index - 1, "previous-head"),
        ("next head ›", index + 1, "next-head"),
    )
    links = []
    for text, number_, link_id in targets:
        if 0 <= number_ < len(layers) * heads:
            layer = layers[number_ // heads]
            target = replace(view, layer=layer, head=number_ % heads, prompt=prompt)
            links.append(dcc.Link(text, href=target.url(), id=link_id))
        else:
            links.append(html.Span(text, className="off"))
    here = f"{view.layer}.{view.head}"
    pinned = view.option("pin") == here
    name = str(trace.head_id((view.layer, view.head)))
    beside = [
        name,
        *([str(trace.head_id(view.option("pin")))] if _is_head(trace, view.option("pin")) else []),
    ]
    wall = replace(view.to("maps"), prompt=prompt).where(heads=",".join(dict.fromkeys(beside)))
    links.append(dcc.Link("side by side", href=wall.url(), id="to-maps"))
    links.append(
        dcc.Link(
            "unpin this head" if pinned else "pin this head",
            href=replace(view, prompt=prompt).where(pin="" if pinned else here).url(),
            id="pin",
        )
    )
    order: Any = {"data-layers": json.dumps(layers), "data-heads": str(heads)}
    return html.Nav(links, className="steps", **named("Heads"), **order)


def _is_head(trace: AttentionTrace, name: str) -> bool:
    try:
        return bool(name and trace.head_id(name))
    except LensError:
        return False


def _pinned(
    library: Library, run: Run, view: Selection, trace: AttentionTrace, prompt: str
) -> list[Any]:
    """The pinned head beside this one: its map, and where their scores differ."""
    pin = view.option("pin")
    if not pin or pin == f"{view.layer}.{view.head}":
        return []
    try:
        other = trace.head_id(pin)
    except LensError:
        return [note_banner(f"There is no head {pin!r} to compare with.")]
    here = view.to_head(*other, prompt)
    maps = [
        card(
            graph(
                f"map-{name}",
                draw.block_map(trace, layer, head, height=380),
                f"Block map of L{layer}H{head}",
                f"{_trace_code(run, prompt)}figures.block_map(trace, {layer}, {head})",
            ),
            words,
        )
        for name, layer, head, words in (
            ("this", view.layer, view.head, f"This head: L{view.layer}H{view.head}"),
            ("pinned", other.layer, other.head, f"Pinned: {other}"),
        )
    ]
    return [
        html.Div(maps, className="halves", id="pinned"),
        *_effect(library, run, view, str(other)),
        card(
            [
                _scores(run, prompt, other, view.variant),
                html.P(dcc.Link(f"Open {other}", href=here.url())),
            ],
            f"Scores of {other}",
        ),
    ]


def finished_traces(run: Run) -> list[str]:
    """The prompts whose attention can be drawn.

    Raises:
        LensError: none yet, or none ever, of a model of mixers alone.
    """
    if run.meta["model"].get("attending") == []:
        raise LensError(NOT_ATTENDING)
    if not run.traces:
        raise LensError(
            f"run {run.id} has no finished trace; complete it: {again(run.path, run.meta)}"
        )
    return run.traces


def known_prompt(view: Selection, traces: list[str], notes: list[str]) -> str:
    """The prompt of a link, or the first and a note."""
    if view.prompt and view.prompt not in traces:
        notes.append(f"This run has no trace of prompt {view.prompt!r}; {traces[0]} is shown.")
    return view.prompt if view.prompt in traces else traces[0]


def prompt_control(run: Run, traces: list[str], prompt: str) -> html.Div:
    """The selector of the prompt whose trace is shown."""
    options = dict(zip(traces, traces, strict=True))
    try:
        for row in run.prompts[run.prompts["prompt_id"].isin(traces)].to_dict("records"):
            name = row["prompt_id"]
            options[name] = f"{name} · {row['kind']} · {row['title']} ({row['tokens']} tokens)"
    except LensError as error:
        options[prompt] = f"{prompt} ({error})"
    return html.Div(select("prompt", "Prompt", options, prompt), className="prompt")


def _scores(run: Run, prompt: str, which: tuple[int, int], variant: str) -> Any:
    """Every score in the form that was asked for; those that have no such form say so."""
    try:
        table = run.heads
    except LensError as error:
        return html.P(str(error), className="problem")
    rows = table[(table["layer"] == which[0]) & (table["head"] == which[1])]
    groups = [g for g in (prompt, *PROMPT_KINDS) if (rows["prompt_id"] == g).any()]
    values = rows.set_index(["prompt_id", "metric", "variant"])
    body: list[list[Cell]] = []
    for metric in METRICS.values():
        chosen = variant if metric.sink_excluded else "raw"
        label = metric.label + (" (counts the first token)" if chosen != variant else "")
        cells = [_cell(values, (group, metric.name, chosen)) for group in groups]
        body.append([(label, "", metric.definition), *cells])
    return data_table(
        "Scores of this head", ["Score", *groups], body, row_heads=True, className="scroll scores"
    )


def _cell(values: Any, key: tuple[str, str, str]) -> Cell:
    if key not in values.index:
        return "–"
    found = values.loc[key]
    value, low, high = (float(found[name]) for name in ("value", "low", "high"))
    title = f"95 % interval {low:.3g} to {high:.3g}, n = {found['n']}" if low == low else ""
    token = f" {found['detail']!r}" if key[1] == "top_key" and found["detail"] else ""
    reason = str(found["detail"]) if value != value else title
    return number(value) + token, "", reason
