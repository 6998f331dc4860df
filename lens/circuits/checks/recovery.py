"""How well scores find edges that are known to be in a circuit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lens.circuits.graph.edge_scores import EdgeScores
from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.common.given import given_as


@dataclass(frozen=True)
class Recovery:
    """Areas under curves, edges ranked by the size of their scores.

    Attributes:
        auroc: chance that an edge of the circuit is scored above another, ties counting half.
        staircase: the pessimistic area of the ACDC paper, `sum (1 - fpr_i) (tpr_i - tpr_(i-1))` over
            thresholds: ties count nothing.
        auprc: average precision, ties taken together.
        positives, edges: in the known circuit, and in all.
        unseen: edges of the known circuit whose score is 0 but for rounding: no threshold finds them.
    """

    auroc: float
    staircase: float
    auprc: float
    positives: int
    edges: int
    unseen: tuple[str, ...]


def recovery(scores: EdgeScores, known: Iterable[str], *, rounding: float = 1e-9) -> Recovery:
    """Compare scores with the edges of a known circuit, given by name.

    Args:
        scores: of all edges.
        known: edges of the circuit.
        rounding: scores up to this share of the largest count as 0. Edges that do nothing often have
            1e-15 of it and edges that are hidden by a saturated softmax not much more; ranking the ones
            above the others would reward a method for what it has not seen.

    Raises:
        LensError: an edge that is not there, no edge or all of them, edges without a score, or a
            rounding that is no share.

    Reference: Conmy et al. 2023, arXiv 2304.14997.

    Example:
        >>> known = lens.circuits.known.logic_gate("sum")
        >>> scores = lens.circuits.score_edges(known.model, known.task, method="eap")
        >>> lens.circuits.checks.recovery(scores, known.edges).auroc
        1.0
    """
    scores = given_as("EdgeScores", scores=scores)
    if not is_number(rounding) or not 0 <= rounding < 1:
        raise LensError(f"rounding must be a share of 0 or more and below 1, got {rounding!r}")
    graph = scores.graph
    positive = np.zeros(graph.n, bool)
    positive[graph.find(known)] = True
    if not 0 < positive.sum() < graph.n:
        raise LensError(
            f"the known circuit has {positive.sum()} of {graph.n} edges; curves need some in and some out"
        )
    values = np.abs(scores.values)
    if np.isnan(values).any():
        raise LensError("some edges have no score (NaN), so they cannot be ranked")
    values[values <= rounding * values.max()] = 0
    levels = np.unique(values)[::-1]
    true = np.array([0, *((values[positive] >= level).sum() for level in levels)])
    false = np.array([0, *((values[~positive] >= level).sum() for level in levels)])
    tpr, fpr = true / true[-1], false / false[-1]
    precision = true[1:] / (true[1:] + false[1:])
    return Recovery(
        float(np.trapezoid(tpr, fpr)),
        float(((1 - fpr[1:]) * np.diff(tpr)).sum()),
        float((precision * np.diff(tpr)).sum()),
        int(positive.sum()),
        graph.n,
        tuple(graph.edges[edge] for edge in np.flatnonzero(positive & (values == 0))),
    )
