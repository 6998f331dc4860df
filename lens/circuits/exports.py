"""Scores and circuits as files of other tools: MIB's `importances.json`, attribution graphs.

The first is what the circuit track of the Mechanistic Interpretability Benchmark reads and writes
(Mueller et al. 2025, arXiv 2504.13151; `Graph.from_json` of hannamw/EAP-IG). The second is what
circuit-tracer and Neuronpedia show (their graph-schema.json, version 1.0.0).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lens.circuits.graph.activations import Ablation, Baseline
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph, StreamGraph, entries, graph_of
from lens.common.errors import LensError
from lens.common.files import as_path, read_json, write_json
from lens.common.given import given_as

_CFG = ("n_layers", "n_heads", "parallel_attn_mlp")


def to_mib(scores: EdgeScores, path: str | Path, *, circuit: Circuit | None = None) -> None:
    """Write scores as `importances.json`: the mean over the prompts of every edge.

    Positive is useful, as in current versions of the benchmark. What its format has no place for stands
    under `lens`, which its reader passes over. Of a hybrid that is the graph, whose layers differ: it stands
    there instead of the sizes in `cfg`, and only `from_mib` reads it.

    Args:
        scores: with keys and values of every query head of its own (kv="head").
        path: of the file.
        circuit: whose edges are marked as in the graph; all of them if not given.

    Raises:
        LensError: keys shared by a group, edges without a score, or a circuit of another graph.
    """
    scores = given_as("EdgeScores", scores=scores)
    graph, values = scores.graph, scores.values
    is_hybrid = isinstance(graph, StreamGraph)
    if not is_hybrid and graph.kv_readers != graph.heads:
        raise LensError(
            "the benchmark's format has keys and values of every query head, and these scores share "
            "them in groups; score the edges with kv='head'"
        )
    if np.isnan(values).any():
        raise LensError(
            f"{int(np.isnan(values).sum())} edges have no score (NaN), and JSON has no number for that"
        )
    if circuit is not None and circuit.graph != graph:
        raise LensError("the circuit is of another graph than the scores")
    kept = np.ones(graph.n, bool) if circuit is None else circuit.kept
    inside = {graph.writers[number] for number in graph.ends[1][kept]}
    found = {
        **({} if is_hybrid else {"cfg": _sizes(graph)}),
        "nodes": {name: {"in_graph": name in inside} for name in graph.writers}
        | {"logits": {"in_graph": True}},
        "edges": {
            name: {"score": float(value), "in_graph": bool(some)}
            for name, value, some in zip(graph.edges, values, kept, strict=True)
        },
        "lens": {
            "method": scores.method,
            "ablation": asdict(scores.ablation),
            "metric": scores.metric,
            "task": scores.task,
            "model": scores.model,
            "prompts": scores.n,
            "steps": scores.steps,
            "rule": scores.rule,
            **({"graph": entries(graph)} if is_hybrid else {}),
        },
    }
    write_json(as_path("path", path), found)


def _sizes(graph: Graph) -> dict[str, Any]:
    """As the benchmark names them."""
    return {
        "n_layers": graph.layers,
        "n_heads": graph.heads,
        "parallel_attn_mlp": graph.parallel,
        "n_kv_heads": graph.kv_heads,
        "mlps": graph.mlps,
    }


def _of_sizes(cfg: Mapping[str, Any]) -> Graph:
    """The graph of `_sizes`, or of the benchmark's own, which have fewer."""
    return Graph(
        cfg["n_layers"],
        cfg["n_heads"],
        cfg.get("n_kv_heads", cfg["n_heads"]),
        mlps=cfg.get("mlps", True),
        parallel=bool(cfg["parallel_attn_mlp"]),
    )


def from_mib(
    path: str | Path, *, baseline: Baseline = "counterfactual", sign: int = 1
) -> EdgeScores:
    """Read `importances.json`, of the benchmark or of `to_mib`, as scores of one row.

    Args:
        path: of the file.
        baseline: what the scores are of, where the file does not say.
        sign: -1 for files whose useful edges are negative, such as the GPT-2 scores that the
            benchmark ships; ablate the largest edge to see which a file is.

    Raises:
        LensError: not such a file, a sign other than 1 and -1, or edges that the graph does not have.
            Edges that the file does not have are NaN.
    """
    if sign not in (1, -1):
        raise LensError(f"sign must be 1 or -1, got {sign!r}")
    config = Ablation(baseline)
    found = read_json(as_path("path", path))
    about = found.get("lens", {})
    is_hybrid = isinstance(about, dict) and "graph" in about
    missing = [key for key in ("nodes", "edges") if key not in found]
    if not is_hybrid:
        missing = ["cfg"] * ("cfg" not in found) + missing
        missing += [f"cfg.{key}" for key in _CFG if key not in found.get("cfg", {})]
    if missing:
        raise LensError(
            f"{path} is no importances.json: it lacks {', '.join(missing)}; to_mib writes one"
        )
    try:
        graph = graph_of(about["graph"]) if is_hybrid else _of_sizes(found["cfg"])
        values = np.full((1, graph.n), np.nan)
        values[0, graph.find(list(found["edges"]))] = [
            sign * float(edge["score"]) for edge in found["edges"].values()
        ]
        config = Ablation(**about["ablation"]) if "ablation" in about else config
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LensError(f"{path} is a damaged importances.json: {error}") from error
    unknown = "unknown"
    return EdgeScores(
        graph,
        values,
        about.get("method", "imported"),
        config,
        about.get("metric", unknown),
        about.get("task", unknown),
        about.get("model", unknown),
        about.get("steps"),
        about.get("rule"),
    )


def to_attribution_graph(
    circuit: Circuit,
    scores: EdgeScores,
    tokens: Sequence[str],
    path: str | Path,
    *,
    answer: str = "",
    slug: str = "circuit",
) -> None:
    """Write a circuit as an attribution graph: nodes are heads and MLPs, links its edges.

    Scores are over all positions, so every node stands at the last token. A link sums the edges by
    query, key and value from one node to another; `influence` of a node is the share of all links'
    sizes in those that leave it. Heads of a layer of a hybrid read as one: the node of what they read, such
    as `a1`, has a link to each of them, the sum of those that leave the head.

    Args:
        circuit: the edges.
        scores: of the same graph.
        tokens: of one prompt, to show beside the graph.
        path: of the file.
        answer: what the logits node says.
        slug: name of the graph there.

    Raises:
        LensError: an empty circuit, another graph, edges without a score, or no token.
    """
    circuit = given_as("Circuit", circuit=circuit)
    scores = given_as("EdgeScores", scores=scores)
    if circuit.graph != scores.graph:
        raise LensError("the circuit is of another graph than the scores")
    if not circuit.n or not tokens:
        raise LensError("an attribution graph needs at least one edge and one token")
    values = scores.values
    if np.isnan(values[circuit.kept]).any():
        raise LensError("edges of the circuit have no score (NaN), so their links have no weight")
    graph = circuit.graph
    links: dict[tuple[str, str], float] = {}
    reader, writer = graph.ends
    for edge in np.flatnonzero(circuit.kept):
        pair = graph.writers[writer[edge]], graph.readers[reader[edge]].partition("<")[0]
        links[pair] = links.get(pair, 0.0) + float(values[edge])
    if isinstance(graph, StreamGraph):
        links |= _to_heads(graph, links)
    whole = sum(map(abs, links.values())) or 1.0
    names = dict.fromkeys(name for pair in links for name in pair)
    layers = max(int(_kind(one, 0)[1]) for one in graph.writers if one != "input") + 1
    nodes = []
    for name in names:
        kind, layer = _kind(name, layers)
        out = sum(abs(weight) for (writer, _), weight in links.items() if writer == name)
        nodes.append(
            {
                "node_id": name,
                "feature": None,
                "layer": layer,
                "ctx_idx": len(tokens) - 1,
                "feature_type": kind,
                "jsNodeId": f"{name}-0",
                "clerp": answer if name == "logits" and answer else name,
                "influence": 1.0 if name == "logits" else out / whole,
                "activation": None,
            }
        )
    found: dict[str, Any] = {
        "metadata": {
            "slug": slug,
            "scan": circuit.model,
            "prompt_tokens": list(tokens),
            "prompt": "".join(tokens),
            "info": {
                "description": f"{circuit!r}; weights are {scores.method} scores in {scores.metric}",
                "generator": {"name": "attention-lens"},
                "create_time_ms": round(time.time() * 1000),
            },
        },
        "qParams": {"linkType": "both", "pinnedIds": [], "supernodes": [], "clickedId": ""},
        "nodes": nodes,
        "links": [
            {"source": writer, "target": reader, "weight": weight}
            for (writer, reader), weight in links.items()
        ],
    }
    write_json(as_path("path", path), found)


def _to_heads(
    graph: StreamGraph, links: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """From what the heads of a layer read to each of them, the sum of the links that leave it."""
    sums: dict[str, float] = {}
    for (writer, _), weight in links.items():
        sums[writer] = sums.get(writer, 0.0) + weight
    read = {reader for _, reader in links}
    return {
        (reader, graph.writers[one]): sums[graph.writers[one]]
        for reader, fed in zip(graph.readers, graph.feeds, strict=True)
        for one in fed
        if reader in read and reader != graph.writers[one] in sums
    }


def _kind(name: str, layers: int) -> tuple[str, str]:
    """Feature type and layer, as the schema spells them."""
    if name == "input":
        return "embedding", "E"
    if name == "logits":
        return "logit", str(layers)
    layer = name[1:].partition(".")[0]
    return ("attention head" if name.startswith("a") else "mlp"), layer
