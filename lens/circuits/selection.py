"""Which edges make a circuit, given a number for each: pure functions on a graph."""

from __future__ import annotations

import heapq

import numpy as np

from lens.circuits.graph import Graph


def top(graph: Graph, values: np.ndarray, count: int) -> np.ndarray:
    """[edges] whether kept: the `count` largest values, the first of equal ones."""
    kept = np.zeros(graph.n, bool)
    kept[np.argsort(-values, kind="stable")[:count]] = True
    return kept


def greedy(graph: Graph, values: np.ndarray, count: int) -> np.ndarray:
    """[edges] whether kept: from `logits` upwards, always the largest edge into a node already in.

    Every kept edge has a path to the logits. Fewer than `count` edges are kept only where no more can
    be reached.
    """
    reader, writer = graph.ends
    into = [np.flatnonzero(reader == number) for number in range(len(graph.readers))]
    inputs: list[list[int]] = [[] for _ in graph.writers]
    for number, feeds in enumerate(graph.feeds):
        for fed in feeds:
            inputs[fed].append(number)
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
