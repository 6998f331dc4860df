"""Figures of `lens.circuits`: layered graph, map of heads, scores of all edges, faithfulness by size."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import DIVERGING, LINE, scale
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.rows import draw_rankings
from lens.figures.style import Look, band, escaped, style
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    from lens.circuits.checks.evaluation import CircuitEvaluation
    from lens.circuits.graph.circuit import Circuit
    from lens.circuits.graph.edge_scores import EdgeScores
    from lens.circuits.graph.graph import Graph


_HEAD = re.compile(r"a(?P<layer>\d+)\.(h|kv)(?P<head>\d+)")
_BESIDE = re.compile(r"a(?P<layer>\d+)\.s(?P<head>\d+)")
"""A head of a mixer beside softmax heads of its layer, or a pair of them (DiffLlama)."""
_LINES = 300  # edges that a layered graph draws
_WIDTHS = (0.6, 1.2, 2.2, 3.6, 6.0)  # pixels, by size of the score
_POSITIVE, _NEGATIVE = DIVERGING[-2], DIVERGING[1]


def layered_graph(
    circuit: Circuit,
    scores: EdgeScores,
    *,
    groups: Mapping[str, Collection[str]] | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """A circuit from `input` below to `logits` above: heads at (head, layer), MLPs to their right.

    Lines join writer and reader node; the edges by query, key and value are one line. Width is the size
    of the summed score, red that the task goes worse without it, blue better. The largest 300 lines are
    drawn, and the title says of how many. `groups` (name -> nodes) are drawn as one node each. Heads of a layer of a hybrid
    read as one, from a point below them.
    """
    graph = circuit.graph
    size = sizes_of_parts(graph.writers)
    if not any(node.startswith("a") and "." not in node for node in graph.readers):
        size["kv_heads"] = graph.kv_heads
    reader, writer = graph.ends
    edges = [
        (graph.writers[writer[edge]], graph.readers[reader[edge]], float(scores.values[edge]))
        for edge in np.flatnonzero(circuit.kept)
    ]
    return edge_graph(
        edges,
        **size,
        of=graph.n,
        groups=groups,
        meta={"task": circuit.task, "model": circuit.model, "edges": circuit.n},
        **look,
    )


def edge_graph(
    edges: Sequence[tuple[str, str, float]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    mlps: bool,
    of: int,
    mixers: int = 0,
    groups: Mapping[str, Collection[str]] | None = None,
    meta: Mapping[str, Any] | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """The picture of `layered_graph` from edges by name, which needs no model.

    Args:
        edges: (writer, reader, score), e.g. ("a0.h1", "a1.h0<k>", 0.3).
        layers, heads, kv_heads, mlps: of the model.
        of: number of edges that the model has.
        mixers: heads of a mixer that a layer has beside its softmax heads.
        groups: name -> nodes that are drawn as one, in their middle; edges within a group are left out.

    Raises:
        LensError: a node in two groups or in none of the model's, or a group named as a node or with < or >
            in its name.
    """
    groups = groups or {}
    member = _members(groups)
    merged = [
        (member.get(writer, writer), _regrouped(reader, member), score)
        for writer, reader, score in edges
    ]
    between = [edge for edge in merged if edge[0] != edge[1].partition("<")[0]]
    lines = _lines(between)
    drawn = sorted(lines.items(), key=lambda line: abs(line[1][0]))[-_LINES:]
    places = _places(layers, heads, kv_heads, mixers)
    for name, nodes in groups.items():
        if name in places or set(name) & set("<>"):
            raise LensError(
                f"a group cannot have the name of a node, nor < or > in it: {name!r}; choose another"
            )
        if unknown := [node for node in nodes if node not in places]:
            raise LensError(
                f"the model has no node {unknown[0]!r} of the group {name!r}; nodes are named as 'a0.h1' or 'm0'"
            )
    for name, nodes in groups.items():
        if nodes:
            known = [places[node] for node in nodes]
            places[name] = (_middle(known, 0), _middle(known, 1))
    largest = max((abs(total) for _, (total, _) in drawn), default=0.0) or 1.0
    figure = go.Figure()
    for sign, color in ((1, _POSITIVE), (-1, _NEGATIVE)):
        for step, thickness in enumerate(_WIDTHS):
            x: list[float | None] = []
            y: list[float | None] = []
            for (writer, reader), (total, _) in drawn:
                size = min(len(_WIDTHS) - 1, int(abs(total) / largest * len(_WIDTHS)))
                if size == step and (total >= 0) == (sign > 0):
                    x += [places[writer][0], places[reader][0], None]
                    y += [places[writer][1], places[reader][1], None]
            if x:
                figure.add_scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    line={"width": thickness, "color": color},
                    opacity=0.35 + 0.13 * step,
                    hoverinfo="skip",
                    showlegend=False,
                )
    middles = [
        [(places[end][axis] + places[start][axis]) / 2 for (start, end), _ in drawn]
        for axis in (0, 1)
    ]
    figure.add_scatter(
        x=middles[0],
        y=middles[1],
        mode="markers",
        marker={"size": 9, "opacity": 0},
        text=[text for _, (_, text) in drawn],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    nodes = list(dict.fromkeys(node for pair in lines for node in pair))
    labels = [
        _short(node) if len(nodes) <= 120 or node in ("input", "logits", *groups) else ""
        for node in nodes
    ]
    figure.add_scatter(
        x=[places[node][0] for node in nodes],
        y=[places[node][1] for node in nodes],
        mode="markers+text",
        marker={
            "size": [20 if node in groups else 13 for node in nodes],
            "symbol": ["diamond" if node in groups else _symbol(node) for node in nodes],
            "color": "#161b22" if look.get("theme") == "dark" else "#ffffff",
            "line": {"width": 1.4, "color": LINE},
        },
        text=[escaped(label) for label in labels],
        textposition="middle right",
        textfont={"size": 10},
        customdata=nodes,
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(
        title=("head; those of mixers s0, s1, ..." if mixers else "head")
        + ("; MLPs at the right" if mlps else ""),
        tickvals=list(range(heads + mixers)),
        ticktext=[*map(str, range(heads)), *(f"s{one}" for one in range(mixers))],
        range=[-0.8, heads + mixers + (1.3 if mlps else -0.2)],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(
        title="layer",
        tickvals=list(range(0, layers, max(1, layers // 12))),
        range=[-1.7, layers + 0.7],
        showgrid=False,
        zeroline=False,
    )
    shown = f"{len(lines):,}"
    if len(drawn) < len(lines):
        shown = f"{len(drawn)} largest of {shown}"
    within = len(merged) - len(between)
    return style(
        figure,
        f"{len(edges):,} edges of {of:,} ({shown} lines"
        + (f", {within:,} edges within groups left out" if within else "")
        + "): red, the task goes worse without; blue, better",
        look,
        height=max(360, 24 * layers + 130),
        meta=meta,
    )


def head_map(circuit: Circuit, scores: EdgeScores, **look: Unpack[Look]) -> go.Figure:
    """Layer × head: summed score of the kept edges that leave each head; blank = not in the circuit."""
    graph = circuit.graph
    writer = graph.ends[1]
    sums = np.bincount(writer, np.where(circuit.kept, scores.values, 0.0), len(graph.writers))
    counts = np.bincount(writer, circuit.kept, len(graph.writers))
    at, letter = _heads(graph)
    inside = (at >= 0) & (counts[at] > 0)
    values = np.where(inside, sums[at], np.nan)
    figure = grid(
        values,
        f"{inside.sum()} of {(at >= 0).sum()} heads are in the circuit: score of what they write",
        look,
        unit=scores.metric,
        text=[[f" over {count:.0f} edges" for count in row] for row in counts[at]],
        meta={"task": circuit.task, "model": circuit.model, "edges": circuit.n},
        signed=True,
    )
    if letter != "H":
        shown = f"L%{{y}}{letter}%{{x}}: %{{z:.4g}}%{{text}}<extra></extra>"
        figure.update_traces(hovertemplate=shown)
    return figure


def _heads(graph: Graph) -> tuple[np.ndarray, str]:
    """[layers, heads] where each head stands among the writers, -1 where a layer has fewer (a hybrid) or none; "H" or "S"."""
    size = sizes_of_parts(graph.writers)
    found, letter = _named(graph.writers, _HEAD), "H"
    if not found:  # pairs of heads alone
        found, letter = _named(graph.writers, _BESIDE), "S"
    heads = 1 + max((head for _, head in found), default=0)
    at = [[found.get((n, head), -1) for head in range(heads)] for n in range(size["layers"])]
    return np.array(at), letter


def _named(writers: Sequence[str], pattern: re.Pattern[str]) -> dict[tuple[int, int], int]:
    """(layer, head) -> number of the writer, of those that a pattern names."""
    matches = map(pattern.fullmatch, writers)
    return {(int(m["layer"]), int(m["head"])): number for number, m in enumerate(matches) if m}


def sizes_of_parts(writers: Sequence[str]) -> dict[str, Any]:
    """`layers`, `heads`, `kv_heads` (as many), `mixers` and `mlps` of a graph with these writers, of a hybrid the largest layer's."""
    heads = 1 + max((head for _, head in _named(writers, _HEAD)), default=0)
    return {
        "layers": 1 + max(int(node[1:].partition(".")[0]) for node in writers if node != "input"),
        "heads": heads,
        "kv_heads": heads,
        "mixers": 1 + max((head for _, head in _named(writers, _BESIDE)), default=-1),
        "mlps": any(node.startswith("m") for node in writers),
    }


def _lines(
    edges: Sequence[tuple[str, str, float]],
) -> dict[tuple[str, str], tuple[float, str]]:
    """(writer, reading node) -> summed score of its edges, and each of them in words."""
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for start, reader, value in edges:
        node, _, part = reader.rstrip(">").partition("<")
        total, text = found.get((start, node), (0.0, f"{start} to {node}"))
        found[start, node] = (total + value, f"{text}<br>{part or 'reads'} {value:+z.3g}")
    return found


def _members(groups: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Node -> the group that it is in."""
    found: dict[str, str] = {}
    for name, nodes in groups.items():
        for node in nodes:
            if node in found:
                raise LensError(
                    f"{node} is in the groups {found[node]!r} and {name!r}; a node can be in one"
                )
            found[node] = name
    return found


def _regrouped(reader: str, member: Mapping[str, str]) -> str:
    """The reader with the group of its node, `movers<k>` of `a3.h5<k>`."""
    node, mark, part = reader.partition("<")
    return f"{member.get(node, node)}{mark}{part}"


def _middle(places: Sequence[tuple[float, float]], axis: int) -> float:
    return sum(place[axis] for place in places) / len(places)


def _symbol(node: str) -> str:
    return "square" if node.startswith("m") else "circle"


def _places(layers: int, heads: int, kv_heads: int, mixers: int) -> dict[str, tuple[float, float]]:
    """x = head (a group of keys between its heads), y = layer; MLPs stand half a layer higher."""
    middle = (heads + mixers - 1) / 2
    found = {"input": (middle, -1.0), "logits": (middle, float(layers))}
    group = heads // kv_heads
    for layer in range(layers):
        found[f"a{layer}"] = (middle, layer - 0.3)  # of a hybrid, whose heads read as one
        for head in range(heads):
            found[f"a{layer}.h{head}"] = (float(head), float(layer))
        for head in range(mixers):
            found[f"a{layer}.s{head}"] = (float(heads + head), float(layer))
        for other in range(kv_heads):
            place = group * other + (group - 1) / 2
            found[f"a{layer}.kv{other}"] = (place, layer - 0.25)
        found[f"m{layer}"] = (heads + mixers + 0.2, layer + 0.4)
    return found


def _short(node: str) -> str:
    """`L3H5` of `a3.h5`, `L3S5` of `a3.s5`, others as they are."""
    if _BESIDE.fullmatch(node):
        return f"L{node[1:].replace('.s', 'S')}"
    return f"L{node[1:].replace('.h', 'H')}" if _HEAD.fullmatch(node) else node


@draws("EdgeScores")
def edge_map(scores: EdgeScores, **look: Unpack[Look]) -> go.Figure:
    """Scores of all edges: writers across, readers down; red = the task goes worse without the edge."""
    graph, values = scores.graph, scores.values
    bound = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=graph.dense(values, np.nan),
            x=graph.writers,
            y=[reader.replace("<", "·").rstrip(">") for reader in graph.readers],
            colorscale=scale(DIVERGING),
            zmin=-bound,
            zmid=0,
            zmax=bound,
            colorbar={"title": {"text": scores.metric, "side": "right"}, "thickness": 12},
            hovertemplate="%{x} to %{y}: %{z:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="writer", showgrid=False)
    figure.update_yaxes(title="reader", autorange="reversed", showgrid=False)
    best, many = scores.table(count=1).iloc[0], int(np.isfinite(values).sum())
    name = best["edge"].replace("<", "·").replace("->", " to ").rstrip(">")
    told = of_many_told(best, "value", ".3g", many, scores.n, plain=True)
    return style(
        figure,
        f"{scores.method} on {scores.task}: most at {name}, {told}",
        look,
        meta={"method": scores.method, "task": scores.task, "model": scores.model},
    )


@draws("CircuitEvaluation")
def faithfulness_curve(evaluation: CircuitEvaluation, **look: Unpack[Look]) -> go.Figure:
    """Faithfulness over the share of edges, with intervals, and the band of random circuits."""
    table = evaluation.table()
    figure = go.Figure()
    once = table[table.ranking == "signed"]
    random = band(once.share, once.random_low, once.random_high, "rgba(128,128,128,0.25)")
    named = {"name": f"{len(evaluation.random)} random circuits", "showlegend": True}
    figure.add_trace(random.update(named))
    draw_rankings(figure, table, "share", ["edges"], "%{customdata[1]:,} edges")
    figure.update_xaxes(title="share of edges kept", tickformat="~%")
    return style(
        figure,
        f"{evaluation.method} on {evaluation.task}: CPR {evaluation.cpr:.3g}, CMD {evaluation.cmd:.3g}",
        look,
        meta={"method": evaluation.method, "task": evaluation.task, "model": evaluation.model},
    )
