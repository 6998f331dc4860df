"""A circuit read aloud: what each of its heads looks at, because of whom, what it writes, and whether that is so.

From the answers downwards: a head that feeds the logits works in the rows of the answers; one that feeds another
head's queries in the rows of that head, its keys or values in the rows that this head looks at. In these rows an edge
into `<q>` or `<k>` is worth the writer's share in the logit of what the head looks at (`explain_pairs`), one into `<v>`
its share in what the head writes. Each edge is then cut alone, in the circuit's own ablation: a sentence about an edge
holds where the metric falls, by an interval over prompts that leaves out 0, and never of one prompt. Edges that do the same on clean and
corrupt prompts (where a head finds its place by position alone) do not show there, and their sentences say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.circuit import Circuit
from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.head_ids import HeadId, head_of_node
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall
from lens.passes.head_outputs import read_calls
from lens.passes.replay import proved
from lens.reading._head import read_head
from lens.reading._rows import row_at
from lens.reading._written import written_shares
from lens.reading.circuit_readings import LOOKS, CircuitReading
from lens.reading.explaining import explain_pairs
from lens.stats.intervals import columns, over_units
from lens.tasks.task import Task

_INPUT = ("embedding", "position", "embedding bias")
_MOST_EDGES = 400  # that are cut one by one
_ROUNDING = 1e-6  # of the effect of all edges


class _Edge(NamedTuple):
    """One kept edge, into one of the heads that it feeds."""

    number: int
    name: str
    writer: str  # node
    reader: str  # node, "logits" or "m1"
    side: str  # "q", "k", "v", or "" of an MLP and of the logits


def circuit(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    seed: Seed = 0,
    progress: bool = True,
) -> CircuitReading:
    """Say in sentences what a circuit does, with the share of every edge and a test of each.

    Args:
        model: as in `lens.reading.explain`.
        task: prompts of one length; give others than the circuit was found on.
        circuit: of this model, such as `lens.circuits.find(...).circuit`.
        seed: of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: a circuit without edges, with more than 400, or of another model; prompts of several lengths;
            pictures.

    Example:
        >>> known = lens.circuits.known.induction_transformer()
        >>> edges = lens.circuits.make_circuit(lens.circuits.score_edges(known.model, known.task).graph, known.edges)
        >>> lens.reading.circuit(known.model, known.task, edges).heads["looks_at"].tolist()
        ['the token before', 'the token after an earlier copy']
    """
    circuit = given_as("Circuit", circuit=circuit)
    if task.clean.is_floating_point():
        raise LensError(
            "lens.reading.circuit tells which tokens heads look at, and this task is of pictures; look at its heads "
            "with lens.vision.rings and trace.overlay"
        )
    task.refuse_lengths("lens.reading.circuit")
    if not 1 <= circuit.n <= _MOST_EDGES:
        raise LensError(
            f"a circuit of 1 to {_MOST_EDGES} edges is read, got {circuit.n}; take fewer edges"
        )
    layout = proved(model)
    edges = _edges(circuit)
    kept = np.flatnonzero(circuit.kept)
    cut = np.ones((len(kept), circuit.graph.n), bool)
    cut[np.arange(len(kept)), kept] = False
    outcome = run_circuits(model, task, cut, circuit.ablation, progress=progress)
    drops = outcome.full[None] - outcome.metric  # [cut edges, prompts]
    drops = drops[[int(np.searchsorted(kept, edge.number)) for edge in edges]]
    prompts = [one.tolist() for one in task.clean]
    with torch.no_grad():
        calls = [read_calls(model, ids[None]) for ids in task.clean]
    pairs = _pairs(circuit, edges, task, calls)
    # [prompts], what is carried, and of what
    shares: dict[_Edge, tuple[np.ndarray, np.ndarray]] = {}
    heads: list[dict[str, Any]] = []
    with advancing(f"{model.name}: circuit", len(pairs), progress) as advance:
        for node, own in pairs.items():
            head = head_of_node(node)
            assert head is not None
            heads.append(_looks(head, own, prompts, calls, seed))
            incoming = [edge for edge in edges if edge.reader == node]
            asked = {edge.side for edge in incoming}
            if asked & {"q", "k"}:
                found = explain_pairs(model, prompts, head, own, seed=seed, progress=False)
                for side, axis in (("q", 2), ("k", 1)):
                    names = found.parts[0 if side == "q" else 1]
                    carried = found.contrast[0].sum(axis)
                    for edge in incoming:
                        if edge.side == side:
                            shares[edge] = _of(edge.writer, names, carried), found.above[0]
            if "v" in asked:
                written = [
                    written_shares(
                        read_head(layout, {"input_ids": ids[None].to(model.device)}, head),
                        torch.tensor(sorted({row for row, _ in some})),
                    )
                    for ids, some in zip(task.clean, own, strict=True)
                ]
                names = tuple(written[0])
                carried = np.array([[one[name] for name in names] for one in written])
                for edge in incoming:
                    if edge.side == "v":
                        shares[edge] = _of(edge.writer, names, carried), np.ones(task.n)
            advance(1)
    table = {
        "edge": [edge.name for edge in edges],
        "writer": [_said(edge.writer) for edge in edges],
        "reader": [_said(edge.reader) for edge in edges],
        "side": [edge.side for edge in edges],
        **_shares([shares.get(edge) for edge in edges], seed),
        **columns("drop", drops, seed, shares=False),
    }
    rows = pd.DataFrame(table)
    gaps = outcome.full - outcome.empty
    gap = float(gaps.mean())
    rows["of_effect"] = rows["drop"] / gap if gap else np.nan
    rows[["of_effect_low", "of_effect_high"]] = np.nan
    if (gaps > 0).all():
        low, high = over_units(drops.T, np.tile(gaps[:, None], len(drops)), seed)
        rows["of_effect_low"], rows["of_effect_high"] = low, high
    rows["holds"] = rows["drop_low"] > _ROUNDING * abs(gap)
    return CircuitReading(
        rows=rows,
        heads=pd.DataFrame(heads),
        metric=task.metric,
        task=task.name,
        model=model.name,
        n=task.n,
    )


def _edges(circuit: Circuit) -> list[_Edge]:
    """The kept edges; a reader of a group of heads is an edge to each of these."""
    graph = circuit.graph
    reader, writer = graph.ends
    found = []
    for number in np.flatnonzero(circuit.kept):
        name, node = graph.readers[reader[number]], graph.writers[writer[number]]
        side = name[-2] if name.endswith(">") else ""
        fed = [graph.writers[one] for one in graph.feeds[reader[number]]] or ["logits"]
        found += [_Edge(int(number), graph.edges[number], node, one, side) for one in fed]
    return found


def _pairs(
    circuit: Circuit, edges: Sequence[_Edge], task: Task, calls: Sequence[Sequence[LayerCall]]
) -> dict[str, list[list[tuple[int, int]]]]:
    """Head -> of each prompt the pairs (row that it works in, key that it looks at most from there), in the model's order."""
    rows: dict[str, list[set[int]]] = {}
    looked: dict[str, list[list[tuple[int, int]]]] = {}

    def give(node: str, places: Sequence[set[int]]) -> None:
        own = rows.setdefault(node, [set() for _ in range(task.n)])
        for one, more in zip(own, places, strict=True):
            one |= more

    answers = [set(one.tolist()) for one in task.positions]
    layers = {call.layer: place for place, call in enumerate(calls[0])}
    give("logits", answers)
    for node in ("logits", *reversed(circuit.graph.writers)):
        if node not in rows:
            continue
        places, keys = rows[node], rows[node]
        head = head_of_node(node)
        if head is not None:
            looked[node] = []
            for own, places_of in zip(calls, places, strict=True):
                at = torch.tensor(sorted(places_of))
                best = row_at(own[layers[head.layer]], at)[head.head].argmax(-1)
                looked[node].append(list(zip(at.tolist(), best.tolist(), strict=True)))
            keys = [{key for _, key in one} for one in looked[node]]
        for edge in edges:
            if edge.reader == node:
                give(edge.writer, keys if edge.side in ("k", "v") else places)
    return dict(sorted(looked.items(), key=lambda one: circuit.graph.writers.index(one[0])))


def _looks(
    head: HeadId,
    pairs: Sequence[Sequence[tuple[int, int]]],
    prompts: Sequence[Sequence[int]],
    calls: Sequence[Sequence[LayerCall]],
    seed: int,
) -> dict[str, Any]:
    """What the head looks at in its rows, in how many of them, how much it gives there, and chance."""
    every = [
        [{name for name, is_so in LOOKS.items() if is_so(ids, *pair)} for pair in own]
        for ids, own in zip(prompts, pairs, strict=True)
    ]
    named = list(LOOKS)[:-1]
    often = {name: np.mean([name in one for own in every for one in own]) for name in named}
    word = max(named, key=lambda name: often[name])
    word = word if often[word] > 0.5 else list(LOOKS)[-1]
    hits, mass, chance = [], [], []
    for ids, own, words, given in zip(prompts, pairs, every, calls, strict=True):
        hits.append(np.mean([word in one for one in words]))
        call = next(one for one in given if one.layer == head.layer)
        rows = row_at(call, torch.tensor([row for row, _ in own]))[head.head].cpu().numpy()
        is_so = np.array(
            [
                [key <= row and LOOKS[word](ids, row, key) for key in range(len(ids))]
                for row, _ in own
            ]
        )
        mass.append((rows * is_so).sum(-1).mean())
        chance.append(
            np.mean([one.sum() / (row + 1) for one, (row, _) in zip(is_so, own, strict=True)])
        )
    found = {"name": str(head), "layer": head.layer, "head": head.head, "looks_at": word}
    cells = columns("mass", np.array([mass]), seed)
    found |= {name: float(cell[0]) for name, cell in cells.items()}
    return found | {"rows": float(np.mean(hits)), "uniform": float(np.mean(chance))}


def _shares(
    parts: Sequence[tuple[np.ndarray, np.ndarray] | None], seed: int
) -> dict[str, np.ndarray]:
    """Columns: of all prompts together, NaN where there is no logit above the row's mean; the ends where each has one."""
    found = np.full((3, len(parts)), np.nan)
    for place, part in enumerate(parts):
        if part is not None and part[1].sum() > 0:
            found[0, place] = part[0].sum() / part[1].sum()
            if (part[1] > 0).all():
                found[1:, place] = over_units(*part, seed)
    return dict(zip(("share", "share_low", "share_high"), found, strict=True))


def _of(node: str, names: Sequence[str], carried: np.ndarray) -> np.ndarray:
    """[prompts], what the parts that a node wrote carry together."""
    own = _INPUT if node == "input" else (_said(node),)
    return carried[:, [name in own for name in names]].sum(1)


def _said(node: str) -> str:
    """`a0.h1` is L0H1, `m0` is L0 MLP, as parts are called."""
    head = head_of_node(node)
    return str(head) if head is not None else f"L{node[1:]} MLP" if node[0] == "m" else node
