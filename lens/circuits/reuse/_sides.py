"""The two sides of a comparison of circuits: what is in each, what they share, and heads renamed at random."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lens import stats
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.head_sets import heads_of
from lens.circuits.graph.selection import pruned, top
from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, head_id
from lens.heads.measures.scores import HeadScores
from lens.stats.controls import jaccard

Comparable: TypeAlias = HeadScores | EdgeScores | Circuit | Iterable[AnyHead]


@dataclass(frozen=True, eq=False)
class Side:
    """Heads of one side: which are in the circuit, [layers, heads], and their centred ranks, if any."""

    heads: np.ndarray
    by_head: np.ndarray
    ranks: np.ndarray | None = None
    redrawn: Callable[[np.random.Generator], Side] | None = None

    def renamed(self, names: np.ndarray) -> Side:
        """Head i is what head `names[i]` was."""
        heads = self.heads.ravel()[names].reshape(self.heads.shape)
        return Side(heads, self.by_head, None if self.ranks is None else self.ranks[names])

    def sets(self) -> dict[str, np.ndarray]:
        """Measure -> what is in the circuit."""
        return {"heads": self.heads.ravel()}


@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeSide(Side):
    """A circuit of one side, with the edges that are kept."""

    graph: Graph
    kept: np.ndarray

    def renamed(self, names: np.ndarray) -> EdgeSide:
        order = _renamed_edges(self.graph, names)
        kept = self.kept[order]
        ranks = None if self.ranks is None else self.ranks[order]
        heads = _heads_in(self.graph, kept)
        return EdgeSide(heads, self.by_head, ranks, graph=self.graph, kept=kept)

    def sets(self) -> dict[str, np.ndarray]:
        nodes = np.zeros(len(self.graph.writers), bool)
        nodes[self.graph.ends[1][self.kept]] = True
        return {"heads": self.heads.ravel(), "nodes": nodes, "edges": self.kept}


def measured(a: Side, b: Side) -> dict[str, float]:
    """Measure of `lens.circuits.reuse.overlap` -> its value; NaN where neither side has anything."""
    mine, its = a.sets(), b.sets()
    shared = (a.heads & b.heads).sum()
    found = {
        "heads": _jaccard(mine["heads"], its["heads"]),
        "first in second": float(shared / a.heads.sum()) if a.heads.any() else np.nan,
        "second in first": float(shared / b.heads.sum()) if b.heads.any() else np.nan,
    }
    found |= {name: _jaccard(mine[name], its[name]) for name in mine if name != "heads"}
    if a.ranks is not None and b.ranks is not None:
        found["rank correlation"] = float(a.ranks @ b.ranks)
    return found


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return float(jaccard(np.stack([a, b]), empty=np.nan)[0, 1])


def sides(
    first: Comparable,
    second: Comparable,
    count: int | None,
    shape: tuple[int, int] | None,
    scores: tuple[EdgeScores, EdgeScores] | None = None,
) -> tuple[Side, Side]:
    """Both sides of a comparison; arguments and errors as in `lens.circuits.reuse.overlap`."""
    if scores is not None and not (isinstance(first, Circuit) and isinstance(second, Circuit)):
        raise LensError(
            "scores are those that two circuits were made from; EdgeScores and HeadScores are compared "
            "as first and second"
        )
    of_scores = isinstance(first, HeadScores | EdgeScores)
    if (count is not None) != of_scores:
        raise LensError(
            "count is the number of edges or heads that scores make a circuit of: a positive integer "
            f"for scores, and none for circuits and head names; got {count!r}"
        )
    if count is not None:
        check_counts(count=count)
    for kind in (HeadScores, EdgeScores, Circuit):
        if isinstance(first, kind) != isinstance(second, kind):
            raise LensError(
                "first and second must be of one kind: EdgeScores, HeadScores, Circuit or lists of "
                f"heads; got {type(first).__name__} and {type(second).__name__}"
            )
    if isinstance(first, HeadScores) and isinstance(second, HeadScores):
        assert count is not None
        layers, heads = first.values.shape
        if first.values.shape != second.values.shape or first.model != second.model:
            raise LensError(
                f"heads of {first.model} ({layers} × {heads}) and {second.model} "
                f"({' × '.join(map(str, second.values.shape))}) are not the same heads; score both "
                "tasks in one model"
            )
        if count > layers * heads:
            raise LensError(f"{first.model} has {layers * heads} heads, count asks for {count}")
        return _of_heads(first, count), _of_heads(second, count)
    if isinstance(first, EdgeScores | Circuit) and isinstance(second, EdgeScores | Circuit):
        if first.graph != second.graph or first.model != second.model:
            raise LensError(
                "the two are of different models or graphs, whose edges cannot be compared; got "
                f"{first.graph} of {first.model!r} and {second.graph} of {second.model!r}"
            )
        if scores is None:
            return _of_edges(first, count), _of_edges(second, count)
        return _of_circuit(first, scores[0]), _of_circuit(second, scores[1])
    if shape is None:
        raise LensError("names of heads need shape=(layers, heads) of the model")
    return _of_names(first, shape), _of_names(second, shape)


def _of_names(heads: Comparable, shape: tuple[int, int]) -> Side:
    found = np.zeros(shape, bool)
    for name in heads_of(heads):  # type: ignore[arg-type]
        found[head_id(name, layers=shape[0], heads=shape[1])] = True
    return Side(found, np.full(shape, np.nan))


def _of_heads(scores: HeadScores, count: int) -> Side:
    units = np.moveaxis(scores.per_prompt, -1, 0)  # [prompts, layers, heads]

    def side(weights: np.ndarray, again: Callable | None = None) -> Side:
        values = np.abs(np.tensordot(weights, units, 1))
        _no_nan(values)
        heads = np.zeros(values.size, bool)
        heads[stats.top(values.ravel(), count)] = True
        return Side(heads.reshape(values.shape), scores.values, _ranks(values.ravel()), again)

    return _with_redraws(side, scores.n)


def _of_edges(given: EdgeScores | Circuit, count: int | None) -> Side:
    graph = given.graph
    if isinstance(given, Circuit):
        shape = graph.layers, graph.heads
        heads = _heads_in(graph, given.kept)
        return EdgeSide(heads, np.full(shape, np.nan), graph=graph, kept=given.kept)
    assert count is not None
    if count > graph.n:
        raise LensError(f"the graph has {graph.n:,} edges, count asks for {count:,}")
    leaving = np.bincount(graph.ends[1], given.values, len(graph.writers))

    def side(weights: np.ndarray, again: Callable | None = None) -> EdgeSide:
        values = np.abs(weights @ given.per_prompt)
        _no_nan(values)
        kept = pruned(graph, top(values, count))
        found = _heads_in(graph, kept)
        by_head = _by_head(graph, leaving)
        return EdgeSide(found, by_head, _ranks(values), again, graph=graph, kept=kept)

    return _with_redraws(side, given.n)


def _of_circuit(given: EdgeScores | Circuit, scores: EdgeScores) -> Side:
    """A circuit with the scores that it was made from: of all edges, so that they can be ranked."""
    assert isinstance(given, Circuit)
    if scores.graph != given.graph or scores.model != given.model:
        raise LensError(
            f"the scores are of {scores.graph} of {scores.model!r}, and the circuit of {given.graph} of "
            f"{given.model!r}"
        )
    values = scores.values
    _no_nan(values)
    leaving = np.bincount(given.graph.ends[1], values, len(given.graph.writers))
    by_head = _by_head(given.graph, leaving)
    heads = _heads_in(given.graph, given.kept)
    return EdgeSide(heads, by_head, _ranks(np.abs(values)), graph=given.graph, kept=given.kept)


def _with_redraws(side: Callable[..., Side], n: int) -> Side:
    """The side of all prompts, which can be made anew from prompts drawn with replacement."""

    def again(draw: np.random.Generator) -> Side:
        return side(stats.draws(n, draw, 1)[0] / n)

    return side(np.full(n, 1 / n), again if n > 1 else None)


def _no_nan(values: np.ndarray) -> None:
    if np.isnan(values).any():
        raise LensError(f"{int(np.isnan(values).sum())} scores are NaN, so they cannot be ranked")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks of length 1, ties at their mean rank: products are Spearman's correlation."""
    ranks = stats.ranks(values)
    ranks = ranks - ranks.mean()
    size = np.linalg.norm(ranks)
    return ranks / size if size else np.full(len(ranks), np.nan)


def _by_head(graph: Graph, writers: np.ndarray) -> np.ndarray:
    """[layers, heads] of numbers or flags of the writers."""
    return np.stack([writers[graph.heads_of(layer)] for layer in range(graph.layers)])


def _heads_in(graph: Graph, kept: np.ndarray) -> np.ndarray:
    nodes = np.zeros(len(graph.writers), bool)
    nodes[graph.ends[1][kept]] = True
    return _by_head(graph, nodes)


def renaming(side: Side, null: str, draw: np.random.Generator) -> np.ndarray:
    """[layers * heads] which head each one becomes."""
    layers, heads = side.heads.shape
    if null == "all":
        return draw.permutation(layers * heads)
    groups = side.graph.kv_readers if isinstance(side, EdgeSide) else heads
    return _within_layers(layers, heads, groups, draw)


def _within_layers(layers: int, heads: int, groups: int, draw: np.random.Generator) -> np.ndarray:
    """[layers * heads] groups change places in each layer, and heads in each group."""
    found = []
    for layer in range(layers):
        order = draw.permutation(groups)[:, None]
        inside = draw.permuted(np.tile(np.arange(heads // groups), (groups, 1)), axis=1)
        found.append(layer * heads + (order * (heads // groups) + inside).ravel())
    return np.concatenate(found)


def with_heads_renamed(graph: Graph, kept: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """[edges] a circuit whose heads have changed places at random within their layers."""
    names = _within_layers(graph.layers, graph.heads, graph.kv_readers, draw)
    return kept[_renamed_edges(graph, names)]


def _renamed_edges(graph: Graph, names: np.ndarray) -> np.ndarray:
    """[edges] which edge each one becomes when head i is what `names[i]` was, layers kept."""
    writers, readers = np.arange(len(graph.writers)), np.arange(len(graph.readers))
    size = graph.heads // graph.kv_readers
    for layer in range(graph.layers):
        inside = names[layer * graph.heads : (layer + 1) * graph.heads] - layer * graph.heads
        groups = inside[::size] // size
        start = graph.attention_readers(layer).start
        writers[graph.heads_of(layer)] = graph.heads_of(layer).start + inside
        rows = [inside, graph.heads + groups, graph.heads + graph.kv_readers + groups]
        readers[graph.attention_readers(layer)] = start + np.concatenate(rows)
    numbers = graph.dense(np.arange(graph.n), -1)
    reader, writer = graph.ends
    return numbers[readers[reader], writers[writer]]
