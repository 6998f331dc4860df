"""Page `/run/<id>/circuits`: which edges carry the task, and what is a circuit of them worth?"""

import base64
import json
from typing import Any
from urllib.parse import urlencode

import pandas as pd
from dash import dcc, html

from lens.common.errors import LensError
from lens.common.results import ends, with_ends
from lens.figures.circuits import edge_graph
from lens.runs import Run
from lens.runs.folders import CIRCUITS, IMPORTANCES
from lens.runs.sections import Section
from lens_dashboards.circuit_edges import RANKINGS, CircuitEdges, circuit_edges
from lens_dashboards.circuit_groups import (
    add_group,
    drawn_groups,
    named_groups,
    read_groups,
    write_groups,
)
from lens_dashboards.library import Library, sections
from lens_dashboards.pages.circuit_lists import groups_list, node_link, nodes_table, paths_list
from lens_dashboards.pages.next_steps import missing
from lens_dashboards.pages.parts import (
    card,
    choice,
    crumbs,
    findings,
    graph,
    limits,
    marked,
    note_banner,
    run_banner,
    section_figure,
    select,
)
from lens_dashboards.pages.section_page import tables
from lens_dashboards.selection import Selection

_SECTIONS = ("edges", "circuit", "joined", "reading", "positions", "overlap")
_BY = {"": "your groups only", "layer": "the heads of each layer", "role": "heads by role"}


def page(library: Library, view: Selection) -> list[Any]:
    """The graph of the best edges, how many, what so many are worth, their nodes and paths."""
    run = library.run(view.run)
    top = [crumbs(run, view), html.H1("Circuits"), *run_banner(run)]
    try:
        edges = circuit_edges(run)
    except LensError as error:
        if run.circuits:
            return [*top, card(html.P(str(error), className="problem"), className="error")]
        return [*top, missing(library, run, "circuit", "circuit")]
    curve = _curve(run)
    chosen, ranking, count, notes = _chosen(run, view, edges, curve)
    own_worth = _own_worth(run) if chosen == edges.find(edges.chosen) else None
    pins = [node for node in view.option("pins").split(",") if node]
    own = named_groups(view.option("groups"), edges, notes)
    by = choice(view, "by", _BY, "", notes)
    groups = drawn_groups(run, edges, by, own)
    shown = _touching(edges, chosen, pins, notes)
    known = sections(run)
    held = [known[name] for name in _SECTIONS if name in known]
    return [
        *top,
        *[note_banner(text) for text in notes],
        findings(held),
        card(
            [
                _controls(ranking, count, curve, by),
                html.P(
                    _worth(curve, own_worth, ranking, count), className="definition", id="worth"
                ),
            ],
            "How many edges",
        ),
        html.Div(
            [
                card(
                    [
                        graph(
                            {"points": "circuit"},
                            _graph(view, edges, shown, groups),
                            "Graph of the circuit",
                            _code(run, shown, chosen, (ranking, count), edges, pins, groups),
                        ),
                        html.P("Click a head to open it.", className="small"),
                        _files(view, ranking, count),
                        html.Div(id="loaded-circuit", role="status"),
                    ],
                    "Graph",
                    className="wide",
                ),
                html.Div(
                    [
                        *_curve_card(
                            run, curve, own_worth, ranking, count / len(edges.names), count
                        ),
                        card(groups_list(view, own, pins), "Groups"),
                        card(nodes_table(view, edges, chosen, pins), "Nodes"),
                    ],
                    className="side",
                ),
            ],
            className="columns",
        ),
        card(paths_list(view, edges, chosen), "Strongest paths"),
        *_places(run, known.get("positions")),
        tables(view, held),
        limits(held),
        dcc.Store(id="circuit-run", data=run.id),
    ]


def _places(run: Run, section: Section | None) -> list[html.Section]:
    """What is needed where, and how large circuits of it are; nothing without the section."""
    if section is None:
        return []
    figures = [section_figure(run, section, name) for name in section.figures]
    return [card([*map(html.P, section.summary[:1]), *figures], "Where in the prompt")]


def loaded(library: Library, run_id: str, contents: str, name: str) -> list[Any]:
    """What a circuit file that somebody loaded looks like with the scores of this run."""
    try:
        run = library.run(run_id)
        edges = circuit_edges(run)
        text = base64.b64decode(contents.partition(",")[2])
        found = json.loads(text)
        chosen, groups = edges.read_circuit(found), read_groups(found, edges)
    except (ValueError, UnicodeDecodeError):
        return [html.P(f"{name} is no JSON file.", className="problem")]
    except LensError as error:
        return [html.P(f"{name}: {error}", className="problem")]
    view = Selection(page="circuits", run=run.id)
    return [
        html.H3(f"{name}: {len(chosen):,} edges, with the scores of this run"),
        html.P(f"Groups in it: {', '.join(groups) or 'none'}.", className="small"),
        graph(
            {"points": "loaded"},
            _graph(view, edges, chosen, groups),
            f"Graph of the circuit in {name}",
            "import lens\n\n"
            f"circuit = lens.circuits.load_circuit({name!r})  # where you keep it\n"
            f"scores = lens.circuits.exports.from_mib({str(run.path / 'circuits/mib/importances.json')!r})\n"
            f"lens.figures.circuits.layered_graph(circuit, scores, groups={groups!r})",
        ),
    ]


def _curve(run: Run) -> pd.DataFrame | None:
    section = sections(run).get("circuit")
    return section.tables["faithfulness"] if section else None


def _chosen(
    run: Run,
    view: Selection,
    edges: CircuitEdges,
    curve: pd.DataFrame | None,
) -> tuple[list[int], str, int, list[str]]:
    """The edges shown, their ranking and number, and notes on what in the link could not be used."""
    notes = []
    section = sections(run).get("edges")
    usual = section.configuration.get("ranking") if section else None
    usual = usual if usual in RANKINGS else "absolute"
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
        if {edges.ends[edge][0], *edges.fed(edges.ends[edge][1])}.intersection(pins)
    ]
    if not kept:
        notes.append(f"No edge of this circuit touches {', '.join(pins)}; all are shown.")
    return kept or chosen


def _graph(
    view: Selection, edges: CircuitEdges, chosen: list[int], groups: dict[str, list[str]]
) -> Any:
    """The layered graph, its heads linked to their pages."""
    lines = edges.lines(chosen)
    figure = edge_graph(lines, of=len(edges.names), groups=groups, **edges.size)
    nodes: Any = figure.data[-1]
    nodes.customdata = [
        [
            f"{node}: {', '.join(groups[node])}" if node in groups else node,
            node_link(view, node, edges),
        ]
        for node in nodes.customdata
    ]
    nodes.hovertemplate = "%{customdata[0]}<extra></extra>"
    return figure


def _code(
    run: Run,
    shown: list[int],
    chosen: list[int],
    size: tuple[str, int],
    edges: CircuitEdges,
    pins: list[str],
    groups: dict[str, list[str]],
) -> str:
    """Python that draws these edges again, of the run's own circuit or of so many of the best."""
    ranking, count = size
    own = len(edges.chosen) == len(chosen) and edges.find(edges.chosen) == chosen
    circuit = (
        "lens.circuits.load_circuit(next(folder.glob('*.json')))"
        if own
        else f"scores.top({count}, absolute={ranking == 'absolute'})"
    )
    begin = (
        "import lens\nfrom pathlib import Path\n\n"
        f"folder = Path({str(run.path / CIRCUITS)!r})\n"
        f"scores = lens.circuits.exports.from_mib({str(run.path / IMPORTANCES)!r})\n"
        f"circuit = {circuit}\n"
    )
    grouped = f", groups={groups!r}" if groups else ""
    if shown is chosen:
        return f"{begin}lens.figures.circuits.layered_graph(circuit, scores{grouped})"
    read = [reader for _, reader in edges.ends if set(pins).intersection(edges.fed(reader))]
    named = dict.fromkeys([*pins, *(reader.partition("<")[0] for reader in read)])
    return (
        f"{begin}pins = {list(named)!r}\n"
        "touching = [e for e in circuit.edges if {p.partition('<')[0] for p in e.split('->')} & set(pins)]\n"
        "part = lens.circuits.make_circuit(circuit.graph, touching, ablation=circuit.ablation, "
        "task=circuit.task, model=circuit.model, made='pinned')\n"
        f"lens.figures.circuits.layered_graph(part, scores{grouped})"
    )


def _controls(ranking: str, count: int, curve: pd.DataFrame | None, by: str) -> html.Div:
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
    parts.append(select("by", "Draw as one", _BY, by))
    return html.Div(parts, className="controls")


def _own_worth(run: Run) -> pd.DataFrame | None:
    """What the run's own circuit was worth, beside others of its size: one row each, by `circuit`."""
    section = sections(run).get("circuit")
    return (
        section.tables["same_size"].drop_duplicates("circuit").set_index("circuit")
        if section
        else None
    )


def _worth(curve: pd.DataFrame | None, own: pd.DataFrame | None, ranking: str, count: int) -> str:
    """What the run's own circuit is worth, or circuits of about this size, from the curve."""
    if curve is None:
        return "How faithful circuits are was not measured in this run."
    if own is not None:
        row = with_ends(own.loc["circuit"], "faithfulness", ".2f", plain=True)
        drawn = _drawn(own.loc["uniform"], "faithfulness", "low", "high")
        return f"{count:,} edges, the circuit of this run: faithfulness {row} on held-out prompts{drawn}."
    rows = curve[(curve["ranking"] == ranking).to_numpy()]
    row = rows.loc[(rows["edges"] - count).abs().idxmin()]
    exact = "" if int(row["edges"]) == count else f", the nearest size that was run to {count:,}"
    return (
        f"{int(row['edges']):,} edges{exact}: faithfulness {with_ends(row, 'faithfulness', '.2f', plain=True)} "
        f"on held-out prompts{_drawn(row, 'random', 'random_low', 'random_high')}; KL divergence from "
        f"the model {row['kl']:.2g} nats."
    )


def _drawn(row: Any, name: str, low: str, high: str) -> str:
    """The faithfulness of random circuits of a size, behind that of one; nothing where none could be drawn."""
    if pd.isna(row[name]):
        return ""
    return f"; random circuits of that size {row[name]:.2f}{ends(row[low], row[high], '.2f')}"


def _curve_card(
    run: Run,
    curve: pd.DataFrame | None,
    own: pd.DataFrame | None,
    ranking: str,
    share: float,
    count: int,
) -> list[html.Section]:
    if curve is None:
        return []
    section = sections(run)["circuit"]
    rows = curve[(curve["ranking"] == ranking).to_numpy()]
    row = rows.loc[(rows["edges"] - count).abs().idxmin()]
    at = row["share"], row["faithfulness"]
    if own is not None:
        at = share, float(own["faithfulness"]["circuit"])
    figure = marked(section.figures["faithfulness"], *at, "shown")
    shown = section_figure(run, section, "faithfulness", graph_id="curve", figure=figure)
    return [card(shown, "What so many are worth")]


def _files(view: Selection, ranking: str, count: int) -> html.Div:
    query = {"ranking": ranking, "edges": count, "groups": view.option("groups")}
    return html.Div(
        [
            html.A(
                "save this circuit",
                href=f"/api/run/{view.run}/circuit.json?{urlencode(query)}",
                download="",
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


def grouped(library: Library, view: Selection, name: str) -> str:
    """The view's groups with one of its pinned nodes more, for the link.

    Raises:
        LensError: a name that cannot be kept, or that is taken.
    """
    edges = circuit_edges(library.run(view.run))
    own = named_groups(view.option("groups"), edges, [])
    taken = {node for nodes in own.values() for node in nodes}
    free = [node for node in view.option("pins").split(",") if node and node not in taken]
    return write_groups(add_group(own, name, free, edges))
