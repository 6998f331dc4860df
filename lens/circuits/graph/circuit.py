"""`Circuit`: the edges of a graph that are kept, with how it was made; saved as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.graph import Graph, StreamGraph, entries, graph_of
from lens.circuits.graph.selection import pruned
from lens.common.errors import LensError
from lens.common.files import as_path, read_json, write_json
from lens.common.given import given_as

FORMAT = "lens-circuit"
VERSION = 1


@dataclass(frozen=True, repr=False, eq=False)
class Circuit:
    """Edges that are kept; all others are ablated when it is run.

    Attributes:
        graph: all edges.
        kept: [edges] bool.
        ablation: what replaces the others.
        task, model: names, for which it was made.
        made: how, in words.
    """

    graph: Graph
    kept: np.ndarray
    ablation: Ablation
    task: str
    model: str
    made: str

    def __post_init__(self) -> None:
        if self.kept.dtype != bool or self.kept.shape != (self.graph.n,):
            raise LensError(
                f"kept must be {self.graph.n} booleans, one per edge; got {self.kept.dtype} of the "
                f"shape {list(self.kept.shape)}"
            )

    @property
    def n(self) -> int:
        """Number of kept edges."""
        return int(self.kept.sum())

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the kept edges, in the order of the graph."""
        return tuple(self.graph.edges[edge] for edge in np.flatnonzero(self.kept))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Writers that a kept edge leaves from, in the order of the model."""
        _, writer = self.graph.ends
        return tuple(self.graph.writers[node] for node in np.unique(writer[self.kept]))

    def pruned(self) -> Circuit:
        """Without the edges that lie on no path from `input` to `logits`."""
        return replace(self, kept=pruned(self.graph, self.kept), made=f"{self.made}, pruned")

    def save(
        self,
        path: str | Path,
        *,
        scores: np.ndarray | None = None,
        faithfulness: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Write a JSON file that `load_circuit` reads; edges by name.

        Args:
            path: of the file.
            scores: [edges] of the graph; those of the kept edges are written beside them.
            faithfulness: a curve, column -> values, for readers of the file.

        Raises:
            LensError: scores of another number of edges, or NaN for a kept one.
        """
        found: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "task": self.task,
            "made": self.made,
            "graph": entries(self.graph),
            "ablation": asdict(self.ablation),
            "nodes": list(self.nodes),
            "edges": list(self.edges),
        }
        if scores is not None:
            if scores.shape != (self.graph.n,) or np.isnan(scores[self.kept]).any():
                raise LensError(
                    f"scores must be {self.graph.n} numbers, one per edge, and not NaN for a kept one; "
                    f"got the shape {list(scores.shape)}"
                )
            found["scores"] = [float(value) for value in scores[self.kept]]
        if faithfulness is not None:
            found["faithfulness"] = {name: list(map(float, v)) for name, v in faithfulness.items()}
        write_json(as_path("path", path), found)

    def __repr__(self) -> str:
        share = self.n / self.graph.n
        return (
            f"Circuit({self.n:,} of {self.graph.n:,} edges ({share:.1%}), {len(self.nodes)} writers; "
            f"{self.made}, {self.ablation.value} ablation, on {self.task!r}, {self.model})"
        )


def make_circuit(
    graph: Graph | StreamGraph,
    edges: Iterable[str],
    *,
    ablation: Ablation | None = None,
    task: str = "",
    model: str = "",
    made: str = "by hand",
) -> Circuit:
    """A circuit of edges given by name.

    Raises:
        LensError: an edge that the graph does not have.

    Example:
        >>> graph = lens.circuits.graph.graph.Graph(2, 4, 4, mlps=False)
        >>> lens.circuits.make_circuit(graph, ["input->a0.h1<v>", "a0.h1->logits"]).nodes
        ('input', 'a0.h1')
    """
    if not isinstance(graph, StreamGraph):
        given_as("Graph", graph=graph)
    of: Any = graph
    kept = np.zeros(of.n, bool)
    kept[of.find(edges)] = True
    ablation = ablation or Ablation(kv="head" if isinstance(graph, StreamGraph) else graph.kv)
    return Circuit(of, kept, ablation, task, model, made)


def load_circuit(path: str | Path) -> Circuit:
    """A circuit that `Circuit.save` wrote.

    Raises:
        LensError: not such a file, or of another version.

    Example:
        >>> lens.circuits.score_edges(small, copying).top(40).save("circuit.json")
        >>> lens.circuits.load_circuit("circuit.json").task
        'induction'
    """
    found = read_json(as_path("path", path))
    if found.get("format") != FORMAT:
        raise LensError(f"{path} is no circuit of lens; Circuit.save writes one")
    if found.get("version") != VERSION:
        raise LensError(
            f"{path} is a circuit of version {found.get('version')!r}; this lens reads {VERSION}"
        )
    try:
        return make_circuit(
            graph_of(found["graph"]),
            found["edges"],
            ablation=Ablation(**found["ablation"]),
            task=found["task"],
            model=found["model"],
            made=found["made"],
        )
    except (KeyError, TypeError) as error:
        raise LensError(f"{path} is a damaged circuit: {error}") from error
