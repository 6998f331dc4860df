"""The best arborescence of a dense graph (Chu & Liu 1965, Edmonds 1967), and circles among greedy parents."""

from __future__ import annotations

import numpy as np


def arborescence(scores: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Parents with the highest sum of scores and no circle.

    Args:
        scores: [nodes, nodes]: of j as the parent of i; the diagonal is not looked at.
        root: [nodes]: of having no parent.

    Returns:
        [nodes] int: the parent, -1 for roots, of which there is at least one.
    """
    nodes = len(root)
    whole = np.full((nodes + 1, nodes + 1), -np.inf)  # node 0 is above all
    whole[1:, 1:] = scores
    whole[1:, 0] = root
    np.fill_diagonal(whole, -np.inf)
    return _edmonds(whole)[1:] - 1


def _edmonds(scores: np.ndarray) -> np.ndarray:
    """[nodes] parents below node 0; circles are drawn together into one node until there is none."""
    parents = scores.argmax(1)
    parents[0] = 0
    circle = _circle(parents)
    if circle is None:
        return parents
    rest = np.setdiff1d(np.arange(len(scores)), circle)  # node 0 stays first
    inner = scores[circle, parents[circle]]
    # the circle as one node, the last: who may be its parent, and for which of its members that breaks it
    gain = scores[np.ix_(circle, rest)] - inner[:, None]
    breaks = gain.argmax(0)
    down = scores[np.ix_(rest, circle)]
    hangs = down.argmax(1)
    size = len(rest) + 1
    smaller = np.full((size, size), -np.inf)
    smaller[:-1, :-1] = scores[np.ix_(rest, rest)]
    smaller[-1, :-1] = gain.max(0)
    smaller[:-1, -1] = down.max(1)
    found = _edmonds(smaller)
    result = parents.copy()
    for number, node in enumerate(rest):
        up = found[number]
        result[node] = circle[hangs[number]] if up == size - 1 else rest[up]
    entered = circle[breaks[found[-1]]]
    result[entered] = rest[found[-1]]
    result[0] = 0
    return result


def _circle(parents: np.ndarray) -> np.ndarray | None:
    """Nodes of one circle that does not hold node 0, or None."""
    state = np.zeros(len(parents), int)
    state[0] = -1
    for start in range(1, len(parents)):
        node = start
        while state[node] == 0:
            state[node] = start
            node = int(parents[node])
        if state[node] == start:
            found = [node]
            while (node := int(parents[node])) != found[0]:
                found.append(node)
            return np.array(found)
        node = start
        while state[node] == start:
            state[node] = -1
            node = int(parents[node])
    return None


def greedy_cycles(parents: np.ndarray) -> int:
    """Circles among parents; -1 has none."""
    seen = np.full(len(parents), -1)
    count = 0
    for start in range(len(parents)):
        node = start
        while node >= 0 and seen[node] < 0:
            seen[node] = start
            node = int(parents[node])
        count += node >= 0 and seen[node] == start
    return int(count)
