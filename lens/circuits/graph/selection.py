"""Which edges make a circuit, given a number for each: pure functions on a graph."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from lens import stats
from lens.circuits.graph.graph import Graph
from lens.common.errors import LensError

SAME = 0.95
"""Share of draws in which an edge that is consistent has its sign."""
_DRAWS, _AT_ONCE = 200, 2**16


def top(values: np.ndarray, count: int) -> np.ndarray:
    """[...] whether kept: the `count` largest of values [...], the first of equal ones."""
    kept = np.zeros(values.shape, bool)
    kept.flat[np.argsort(-values, axis=None, kind="stable")[:count]] = True
    return kept


def _fed(graph: Graph) -> list[list[int]]:
    """Of each writer the readers that it is made from: `feeds` the other way round."""
    inputs: list[list[int]] = [[] for _ in graph.writers]
    for number, feeds in enumerate(graph.feeds):
        for fed in feeds:
            inputs[fed].append(number)
    return inputs


def greedy(graph: Graph, values: np.ndarray, count: int) -> np.ndarray:
    """[edges] whether kept: from `logits` upwards, always the largest edge into a node already in.

    Every kept edge has a path to the logits. Fewer than `count` edges are kept only where no more can
    be reached.
    """
    reader, writer = graph.ends
    into = [np.flatnonzero(reader == number) for number in range(len(graph.readers))]
    inputs = _fed(graph)
    kept = np.zeros(graph.n, bool)
    reached = {len(graph.readers) - 1}
    heap = [(-values[edge], int(edge)) for edge in into[-1]]
    heapq.heapify(heap)
    left = count
    while heap and left:
        _, edge = heapq.heappop(heap)
        kept[edge] = True
        left -= 1
        for number in inputs[writer[edge]]:
            if number not in reached:
                reached.add(number)
                for more in into[number]:
                    heapq.heappush(heap, (-values[more], int(more)))
    return kept


def consistent(per_prompt: np.ndarray, seed: int = 0) -> np.ndarray:
    """[edges] whether the mean over drawn prompts has one sign in `SAME` of the draws; `per_prompt` [prompts, edges].

    Of one prompt all are. Reference: edge selection of MIB's best entries, arXiv 2510.25786.
    """
    prompts, edges = per_prompt.shape
    if prompts < 2:
        return np.ones(edges, bool)
    drawn = stats.draws(prompts, seed, _DRAWS)
    kept = np.zeros(edges, bool)
    for start in range(0, edges, _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        means = drawn @ per_prompt[:, some].astype(float)
        above = (means > 0).mean(0), (means < 0).mean(0)
        kept[some] = np.maximum(*above) >= SAME
    return kept


def pruned(graph: Graph, kept: np.ndarray) -> np.ndarray:
    """[edges] whether kept and on a path from `input` to `logits` of kept edges."""
    reader, writer = graph.ends
    feeds = graph.feeds
    kept = kept.copy()
    while True:
        written = set(writer[kept].tolist())  # writers that somebody reads
        fed = {0} | {node for number in set(reader[kept].tolist()) for node in feeds[number]}
        logits = len(graph.readers) - 1
        alive = np.array(
            [
                number == logits or any(node in written for node in feeds[number])
                for number in range(len(graph.readers))
            ]
        )
        useful = np.array([node in fed for node in range(len(graph.writers))])
        left = kept & alive[reader] & useful[writer]
        if (left == kept).all():
            return left
        kept = left


def without(graph: Graph, kept: np.ndarray, writers: Iterable[str]) -> np.ndarray:
    """[edges] whether kept, once nobody reads these writers any more.

    Raises:
        LensError: a writer that is not there.
    """
    names = list(writers)
    if unknown := [name for name in names if name not in graph.writers]:
        raise LensError(
            f"there is no writer {unknown[0]!r} in this graph; one is written like "
            f"{graph.writers[-1]!r}"
        )
    numbers = [graph.writers.index(name) for name in names]
    return kept & ~np.isin(graph.ends[1], numbers)


def random_edges(graph: Graph, count: int, draw: np.random.Generator) -> np.ndarray:
    """[edges] whether kept: `count` edges, all alike."""
    kept = np.zeros(graph.n, bool)
    kept[draw.choice(graph.n, count, replace=False)] = True
    return kept


def same_degrees(graph: Graph, kept: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """[edges] whether kept: random edges that leave each writer, and reach each reader, as often.

    Two kept edges a -> x and b -> y become a -> y and b -> x where those are edges and not kept yet;
    ten tries for each kept edge. A circuit that no swap fits comes back as it is.
    """
    present = graph.dense(kept)
    reader, writer = (end[kept].copy() for end in graph.ends)
    for one, other in draw.integers(0, max(1, len(reader)), (10 * len(reader), 2)):
        x, y, a, b = reader[one], reader[other], writer[one], writer[other]
        free = graph.allowed[y, a] and graph.allowed[x, b] and not (present[y, a] or present[x, b])
        if free and a != b and x != y:
            present[x, a] = present[y, b] = False
            present[y, a] = present[x, b] = True
            reader[one], reader[other] = y, x
    return present[graph.allowed]


def random_path(graph: Graph, draw: np.random.Generator) -> np.ndarray:
    """Numbers of the edges of a path from `input` to `logits`, drawn from the logits downwards."""
    reader, writer = graph.ends
    inputs = _fed(graph)
    found, at = [], len(graph.readers) - 1
    while True:
        edge = int(draw.choice(np.flatnonzero(reader == at)))
        found.append(edge)
        if writer[edge] == 0:
            return np.array(found)
        at = int(draw.choice(inputs[writer[edge]]))
