"""Page `/run/<id>/circuits`: which edges carry the task, and what is a circuit of them worth?"""

import base64
import json
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from dash import dcc, html

from lens.errors import LensError
from lens.figures.circuits import edge_graph
from lens.runs import Run
from lens_dashboards.circuit_edges import RANKINGS, CircuitEdges, circuit_edges
from lens_dashboards.library import Library
from lens_dashboards.library import section as read_section
from lens_dashboards.pages.parts import (
    card,
    crumbs,
    findings,
    graph,
    missing,
    named,
    note_banner,
    number,
    run_banner,
    select,
)
from lens_dashboards.selection import Selection

_MOST_NODES = 60
_MARK = "#c2410c"


def page(library: Library, view: Selection) -> list[Any]:
    """The graph of the best edges, how many, what so many are worth, their nodes and paths."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1("Circuits"), *run_banner(run)]
    try:
        edges = circuit_edges(run)
    except LensError:
        return [*top, missing(run, "circuit", "lens circuit --model {model} --task induction")]
    curve = _curve(run)
    chosen, ranking, count, notes = _chosen(run, view, edges, curve)
    pins = [node for node in view.option("pins").split(",") if node]
    shown = _touching(edges, chosen, pins, notes)
    return [
        *top,
        *[note_banner(text) for text in notes],
        findings(read_section(run, name) for name in ("edges", "circuit") if name in run.sections),
        card(
            [
                _controls(run, ranking, count, curve),
                html.P(_worth(curve, ranking, count), className="definition", id="worth"),
            ],
            "How many edges",
        ),
        html.Div(
            [
                card(
                    [
                        graph(
                            "circuit",
                            _graph(run, edges, shown),
                            "Graph of the circuit",
                            _code(run, edges, chosen, ranking, count) if shown is chosen else "",
                        ),
                        html.P("Click a head to open it.", className="small"),
                        _files(run, ranking, count),
                        html.Div(id="loaded-circuit", role="status"),
                    ],
                    "Graph",
                    className="wide",
                ),
                html.Div(
                    [
                        *_curve_card(run, curve, ranking, count),
                        card(_nodes(run, view, edges, chosen, pins), "Nodes"),
                    ],
                    className="side",
                ),
            ],
            className="columns",
        ),
        card(_paths(run, edges, chosen), "Strongest paths"),
        dcc.Store(id="circuit-run", data=run.id),
    ]


def loaded(library: Library, run_id: str, contents: str, name: str) -> list[Any]:
    """What a circuit file that somebody loaded looks like with the scores of this run."""
    try:
        run = library.run(run_id)
        edges = circuit_edges(run)
        text = base64.b64decode(contents.partition(",")[2])
        chosen = edges.read_circuit(json.loads(text))
    except (ValueError, UnicodeDecodeError):
        return [html.P(f"{name} is no JSON file.", className="problem")]
    except LensError as error:
        return [html.P(f"{name}: {error}", className="problem")]
    return [
        html.H3(f"{name}: {len(chosen):,} edges, with the scores of this run"),
        graph("loaded", _graph(run, edges, chosen), f"Graph of the circuit in {name}"),
    ]


def _curve(run: Run) -> pd.DataFrame | None:
    if "circuit" not in run.sections:
        return None
    return read_section(run, "circuit").tables["faithfulness"]


def _chosen(
    run: Run,
    view: Selection,
    edges: CircuitEdges,
    curve: pd.DataFrame | None,
) -> tuple[list[int], str, int, list[str]]:
    """The edges shown, their ranking and number, and notes on what in the link could not be used."""
    notes = []
    section = read_section(run, "edges") if "edges" in run.sections else None
    usual = section.configuration.get("ranking", "absolute") if section else "absolute"
    ranking = view.option("ranking") or usual
    if ranking not in RANKINGS:
        notes.append(f"There is no ranking {ranking!r}; {usual} is shown.")
        ranking = usual
    count = len(edges.chosen)
    if given := view.option("edges"):
        if given.isdigit() and 0 < int(given) <= len(edges.names):
            count = int(given)
        else:
            notes.append(f"{given!r} is no number of edges from 1 to {len(edges.names):,}.")
    if ranking == usual and count == len(edges.chosen):
        return edges.find(edges.chosen), ranking, count, notes
    return edges.top(count, ranking), ranking, count, notes


def _touching(
    edges: CircuitEdges, chosen: list[int], pins: list[str], notes: list[str]
) -> list[int]:
    """Edges that leave or enter a pinned node; all without pins."""
    if not pins:
        return chosen
    kept = [
        edge
        for edge in chosen
        if edges.ends[edge][0] in pins or edges.ends[edge][1].partition("<")[0] in pins
    ]
    if not kept:
        notes.append(f"No edge of this circuit touches {', '.join(pins)}; all are shown.")
    return kept or chosen


def _graph(run: Run, edges: CircuitEdges, chosen: list[int]) -> Any:
    """The layered graph, its heads linked to their pages."""
    figure = edge_graph(edges.lines(chosen), of=len(edges.names), **edges.size)
    nodes: Any = figure.data[-1]
    nodes.customdata = [[node, _link(run, node)] for node in nodes.customdata]
    nodes.hovertemplate = "%{customdata[0]}<extra></extra>"
    return figure


def _code(run: Run, edges: CircuitEdges, chosen: list[int], ranking: str, count: int) -> str:
    """Python that draws these edges again, of the run's own circuit or of so many of the best."""
    own = len(edges.chosen) == len(chosen) and edges.find(edges.chosen) == chosen
    circuit = (
        "lens.circuits.load_circuit(next(folder.glob('*.json')))"
        if own
        else f"scores.top({count}, absolute={ranking == 'absolute'})"
    )
    return (
        "import lens\nfrom pathlib import Path\n\n"
        f"folder = Path({str(run.path)!r}) / 'circuits'\n"
        "scores = lens.circuits.from_mib(folder / 'mib' / 'importances.json')\n"
        f"circuit = {circuit}\n"
        "lens.figures.circuits.layered_graph(circuit, scores)"
    )


def _controls(run: Run, ranking: str, count: int, curve: pd.DataFrame | None) -> html.Div:
    words = {"absolute": "largest by size", "signed": "largest with sign"}
    parts: list[Any] = [select("ranking", "Edges", words, ranking)]
    if curve is not None:
        rows = curve[(curve["ranking"] == ranking).to_numpy()]
        sizes = rows["edges"].astype(int).tolist()
        options = {
            str(size): f"{size:,} ({share:.1%})"
            for size, share in zip(sizes, rows["share"], strict=True)
        }
        options = {str(count): f"{count:,}"} | options
        ordered = dict(sorted(options.items(), key=lambda one: int(one[0])))
        parts.append(select("edges", "How many", ordered, str(count)))
        steps = list(ordered)
        parts.append(
            html.Div(
                [
                    html.Label("Fewer or more", htmlFor="edge-slider"),
                    dcc.Slider(
                        0,
                        len(steps) - 1,
                        1,
                        value=steps.index(str(count)),
                        marks=None,
                        id="edge-slider",
                        allow_direct_input=False,
                    ),
                    dcc.Store(id="edge-steps", data=steps),
                ],
                className="control slider",
            )
        )
    return html.Div(parts, className="controls")


def _worth(curve: pd.DataFrame | None, ranking: str, count: int) -> str:
    """What circuits of about this size are worth, from the curve."""
    if curve is None:
        return "How faithful circuits are was not measured in this run."
    rows = curve[(curve["ranking"] == ranking).to_numpy()]
    row = rows.loc[(rows["edges"] - count).abs().idxmin()]
    exact = "" if int(row["edges"]) == count else f", the nearest size that was run to {count:,}"
    return (
        f"{int(row['edges']):,} edges{exact}: faithfulness {row['faithfulness']:.2f} "
        f"[{row['low']:.2f}, {row['high']:.2f}] on held-out prompts; random circuits of that size "
        f"{row['random']:.2f} [{row['random_low']:.2f}, {row['random_high']:.2f}]; KL divergence from "
        f"the model {row['kl']:.2g} nats."
    )


def _curve_card(
    run: Run, curve: pd.DataFrame | None, ranking: str, count: int
) -> list[html.Section]:
    if curve is None:
        return []
    figure = go.Figure(read_section(run, "circuit").figures["faithfulness"])
    rows = curve[(curve["ranking"] == ranking).to_numpy()]
    row = rows.loc[(rows["edges"] - count).abs().idxmin()]
    figure.add_scatter(
        x=[row["share"]],
        y=[row["faithfulness"]],
        mode="markers",
        marker={"size": 16, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": _MARK}},
        name="shown",
        hoverinfo="skip",
    )
    code = (
        "from lens.runs import open_run\n\n"
        f"section = open_run({str(run.path)!r}).section('circuit')\n"
        "section.tables['faithfulness'], section.figures['faithfulness']"
    )
    return [card(graph("curve", figure, "Faithfulness by size", code), "What so many are worth")]


def _files(run: Run, ranking: str, count: int) -> html.Div:
    return html.Div(
        [
            html.A(
                "save this circuit",
                href=f"/api/run/{run.id}/circuit.json?ranking={ranking}&edges={count}",
                download="circuit.json",
            ),
            dcc.Upload(
                html.Button("load a circuit", type="button", className="quiet"),
                id="circuit-file",
                accept="application/json",
                max_size=32 << 20,
            ),
        ],
        className="controls",
    )


def _nodes(
    run: Run, view: Selection, edges: CircuitEdges, chosen: list[int], pins: list[str]
) -> list[Any]:
    rows = edges.nodes(chosen)
    body = []
    for row in rows[:_MOST_NODES]:
        node = row["node"]
        after = [one for one in pins if one != node] if node in pins else [*pins, node]
        body.append(
            html.Tr(
                [
                    html.Td(_node(run, node)),
                    html.Td(f"{row['edges']:,}", className="number"),
                    html.Td(f"{row['score']:+.3g}", className="number"),
                    html.Td(
                        dcc.Link(
                            "unpin" if node in pins else "pin",
                            href=view.where(pins=",".join(after)).url(),
                            title=f"{'unpin' if node in pins else 'pin'} {node}",
                        )
                    ),
                ],
                className="marked" if node in pins else "",
            )
        )
    head = ("Node", "Edges out", "Sum of scores", "Pinned")
    left = len(rows) - len(body)
    return [
        html.P(
            "With pinned nodes the graph shows only the edges that leave or enter them."
            + (f" The {_MOST_NODES} largest of {len(rows)} nodes." if left else ""),
            className="small",
        ),
        html.Div(
            html.Table(
                [
                    html.Thead(html.Tr([html.Th(words, scope="col") for words in head])),
                    html.Tbody(body),
                ]
            ),
            className="scroll tall",
            tabIndex=0,
            role="region",
            **named("Nodes of the circuit"),
        ),
    ]


def _paths(run: Run, edges: CircuitEdges, chosen: list[int]) -> Any:
    paths = edges.paths(chosen)
    if not paths:
        return html.P("No path from the input to the logits.")
    items = []
    for size, nodes in paths:
        parts: list[Any] = []
        for node in nodes:
            parts += [_node(run, node), " → "]
        items.append(html.Li([*parts[:-1], html.Span(f": weakest edge {number(size)}")]))
    return html.Ol(items, className="strongest", id="paths")


def _node(run: Run, node: str) -> Any:
    """A head leads to its page."""
    link = _link(run, node)
    return dcc.Link("L" + node[1:].replace(".h", "H"), href=link) if link else node


def _link(run: Run, node: str) -> str:
    """The page of a head, "" for other nodes."""
    if not (node.startswith("a") and ".h" in node):
        return ""
    layer, head = map(int, node[1:].split(".h"))
    return Selection(page="head", run=run.id, layer=layer, head=head).url()
