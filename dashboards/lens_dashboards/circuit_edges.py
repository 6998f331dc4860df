"""The edges of a run's model with their scores, as its `importances.json` has them; no torch needed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from lens.common.errors import LensError
from lens.common.head_ids import head_of_node
from lens.figures.circuits import sizes_of_parts
from lens.runs import Run
from lens.runs.commands import analysis
from lens.runs.folders import CIRCUITS, IMPORTANCES

RANKINGS = ("absolute", "signed")
_FORMAT, _VERSION = "lens-circuit", 1  # as `lens.circuits.graph.circuit.Circuit.save` writes
_PATH_EDGES, _MOST_PATHS = 2000, 10


@dataclass(frozen=True, eq=False)
class CircuitEdges:
    """All edges of a model, scored for one task.

    Attributes:
        names: "writer->reader".
        scores: [edges], positive: the task goes worse without the edge.
        saved: the circuit file of the run, without its edges: graph, ablation, task, model, made.
        chosen: names of the edges of that circuit.
        attending: layers whose heads have a page of their own, those of softmax attention; None: all.
    """

    names: tuple[str, ...]
    scores: np.ndarray
    saved: dict[str, Any]
    chosen: tuple[str, ...]
    attending: frozenset[int] | None = None

    @property
    def size(self) -> dict[str, Any]:
        """`layers`, `heads`, `kv_heads`, `mlps` of the model; of a hybrid those of its largest layer."""
        graph = self.saved["graph"]
        if "writers" in graph:
            return sizes_of_parts(graph["writers"])
        return {name: graph[name] for name in ("layers", "heads", "kv_heads", "mlps")}

    @cached_property
    def _read_together(self) -> dict[str, tuple[str, ...]]:
        """Of a hybrid: `a1` -> the heads of the layer, which read as one."""
        graph = self.saved["graph"]
        readers = zip(graph.get("readers", ()), graph.get("feeds", ()), strict=True)
        return {
            reader: tuple(graph["writers"][one] for one in fed) for reader, fed in readers if fed
        }

    def fed(self, reader: str) -> tuple[str, ...]:
        """Nodes that a reader is an input of: one, or of a hybrid all heads of a layer."""
        return self._read_together.get(reader, (reader.partition("<")[0],))

    def is_mixer(self, node: str) -> bool:
        """Whether it is a head of a layer without softmax attention, which has no page of its own."""
        head = head_of_node(node)
        return bool(head and self.attending is not None and head.layer not in self.attending)

    @cached_property
    def ends(self) -> list[tuple[str, str]]:
        """(writer, reader) of each edge."""
        return [tuple(name.split("->", 1)) for name in self.names]  # pyright: ignore[reportReturnType]

    @cached_property
    def number(self) -> dict[str, int]:
        """Name -> number of the edge."""
        return {name: number for number, name in enumerate(self.names)}

    def top(self, count: int, ranking: str) -> list[int]:
        """Numbers of the `count` edges that count most, those on no path to the logits left out."""
        values = np.abs(self.scores) if ranking == "absolute" else self.scores
        return self._on_paths(np.argsort(-values, kind="stable")[:count].tolist())

    def find(self, names: Iterable[str]) -> list[int]:
        """Numbers of edges by name.

        Raises:
            LensError: an edge that this model does not have.
        """
        found = []
        for name in names:
            if name not in self.number:
                raise LensError(f"the model of this run has no edge {str(name)[:60]!r}")
            found.append(self.number[name])
        return found

    def lines(self, edges: Iterable[int]) -> list[tuple[str, str, float]]:
        """(writer, reader, score)."""
        return [(*self.ends[edge], float(self.scores[edge])) for edge in edges]

    def nodes(self, edges: Iterable[int]) -> list[dict[str, Any]]:
        """Writers of these edges: edges out of them, and the sum of their scores, the largest first."""
        found: dict[str, list[float]] = {}
        for writer, _, score in self.lines(edges):
            found.setdefault(writer, []).append(score)
        rows = [
            {"node": node, "edges": len(scores), "score": sum(scores)}
            for node, scores in found.items()
        ]
        return sorted(rows, key=lambda row: -abs(row["score"]))

    def paths(self, edges: list[int]) -> list[tuple[float, tuple[str, ...]]]:
        """Paths from `input` to `logits` whose weakest edge is strongest: (its size, nodes).

        Looked for among the 2,000 largest of the edges.
        """
        largest = sorted(edges, key=lambda edge: -abs(self.scores[edge]))[:_PATH_EDGES]
        into: dict[str, dict[str, float]] = {}
        for writer, reader, score in self.lines(largest):
            for node in self.fed(reader):
                strongest = into.setdefault(node, {})
                strongest[writer] = max(strongest.get(writer, 0.0), abs(score))
        best: dict[str, list[tuple[float, tuple[str, ...]]]] = {"input": [(np.inf, ("input",))]}
        for node in sorted(into, key=_depth):
            found = [
                (min(weakest, size), (*path, node))
                for writer, size in into[node].items()
                for weakest, path in best.get(writer, [])
            ]
            best[node] = sorted(found, key=lambda one: -one[0])[:_MOST_PATHS]
        return best.get("logits", [])

    def circuit(
        self, edges: list[int], made: str, groups: Mapping[str, list[str]] | None = None
    ) -> dict[str, Any]:
        """A circuit file of these edges, which `lens.circuits.load_circuit` reads; it keeps the groups."""
        return {
            **self.saved,
            "made": made,
            "groups": {name: list(nodes) for name, nodes in (groups or {}).items()},
            "nodes": [row["node"] for row in self.nodes(edges)],
            "edges": [self.names[edge] for edge in edges],
            "scores": [float(self.scores[edge]) for edge in edges],
        }

    def read_circuit(self, found: Any) -> list[int]:
        """Edges of a circuit file.

        Raises:
            LensError: not such a file, or one of another model.
        """
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise LensError("this is no circuit of lens; Circuit.save and this page write them")
        if found.get("version") != _VERSION or not isinstance(found.get("edges"), list):
            raise LensError(
                f"this circuit has version {found.get('version')!r}; {_VERSION} can be read"
            )
        if found.get("graph") != self.saved["graph"]:
            raise LensError(
                f"this circuit is of a model with the sizes {found.get('graph')}, and the model of "
                f"this run has {self.saved['graph']}"
            )
        return self.find(found["edges"])

    def _on_paths(self, edges: list[int]) -> list[int]:
        """Those that lie on a path from `input` to `logits`, in the order of the model."""
        ahead: dict[str, set[str]] = {}
        behind: dict[str, set[str]] = {}
        for edge in edges:
            writer, reader = self.ends[edge]
            for node in self.fed(reader):
                ahead.setdefault(writer, set()).add(node)
                behind.setdefault(node, set()).add(writer)
        fed, useful = _reached("input", ahead), _reached("logits", behind)
        kept = [
            edge
            for edge in edges
            if self.ends[edge][0] in fed and useful.intersection(self.fed(self.ends[edge][1]))
        ]
        return sorted(kept)


def _reached(start: str, steps: dict[str, set[str]]) -> set[str]:
    found, waiting = {start}, [start]
    while waiting:
        for node in steps.get(waiting.pop(), ()):
            if node not in found:
                found.add(node)
                waiting.append(node)
    return found


def _depth(node: str) -> tuple[float, int]:
    """Order in which a model computes its nodes."""
    if node == "input":
        return (-1.0, 0)
    if node == "logits":
        return (float("inf"), 0)
    layer = int(node[1:].partition(".")[0])
    return (layer, 1 if node.startswith("m") else 0)


def circuit_edges(run: Run) -> CircuitEdges:
    """The scored edges of a run of `lens circuit`.

    Raises:
        LensError: the run has none, or they cannot be read.
    """
    if not run.door.has(IMPORTANCES) or not run.circuits:
        raise LensError(
            f"run {run.id} has no circuit; make one: {analysis(run.path, {}, 'circuit')}"
        )
    files = (run.path / IMPORTANCES, run.path / CIRCUITS / f"{run.circuits[0]}.json")
    return _read(run, *(path.stat().st_mtime_ns for path in files))


@lru_cache(maxsize=4)
def _read(run: Run, *changed: int) -> CircuitEdges:
    edges, saved = run.importances().edges, run.circuit(run.circuits[0]).model_dump()
    chosen = tuple(saved["edges"])
    for name in ("edges", "nodes", "scores", "faithfulness"):
        saved.pop(name, None)
    scores = np.array([edge.score for edge in edges.values()], dtype=float)
    attending = run.meta["model"].get("attending")
    pages = None if attending is None else frozenset(attending)
    found = CircuitEdges(tuple(edges), scores, saved, chosen, pages)
    found.find(chosen)
    return found
