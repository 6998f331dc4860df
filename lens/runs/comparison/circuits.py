"""What the circuits of two runs share, from their files alone."""

from __future__ import annotations

from itertools import product

import pandas as pd

from lens.common.errors import LensError
from lens.runs.folders import Run
from lens.runs.schema import CircuitFile

CIRCUIT_COLUMNS = (
    "circuit_a",
    "circuit_b",
    "part",
    "shared",
    "only_a",
    "only_b",
    "jaccard",
    "by_chance",
)
_PARTS = ("nodes", "edges")


def compare_circuits(a: Run, b: Run) -> tuple[pd.DataFrame, list[str]]:
    """Every circuit of A with every one of B: nodes and edges in both, and what chance would give.

    `jaccard` = shared / in either. `by_chance` = J of two sets of these sizes drawn from all N nodes or
    edges of the graph: s / (|A| + |B| - s) with s = |A| |B| / N, the mean number that they share; NaN
    where the file does not tell N.

    Returns:
        A table with `CIRCUIT_COLUMNS`, and sentences about circuits that were not compared.
    """
    rows: list[tuple[object, ...]] = []
    refused: list[str] = []
    sides = []
    for run in (a, b):
        found, problems = _circuits(run)
        sides.append(found)
        refused += problems
    for (name, x), (other, y) in product(sides[0].items(), sides[1].items()):
        if x.graph != y.graph:
            refused.append(
                f"circuits {name} and {other} are not compared: their models have differing graphs"
            )
            continue
        totals = _totals(x), _totals(y)
        for part in _PARTS:
            total = totals[0][part] or totals[1][part]
            rows.append(
                (name, other, part, *_overlap(set(getattr(x, part)), set(getattr(y, part)), total))
            )
    return pd.DataFrame(rows, columns=list(CIRCUIT_COLUMNS)), refused


def _overlap(x: set[str], y: set[str], total: float | None) -> tuple[object, ...]:
    shared, either = len(x & y), len(x | y)
    chance = len(x) * len(y) / total if total else float("nan")
    return (
        shared,
        len(x - y),
        len(y - x),
        shared / either if either else float("nan"),
        chance / (len(x) + len(y) - chance) if either else float("nan"),
    )


def _circuits(run: Run) -> tuple[dict[str, CircuitFile], list[str]]:
    """Name -> contents of each circuit file, and what cannot be read."""
    found: dict[str, CircuitFile] = {}
    problems = []
    for name in run.circuits:
        try:
            found[name] = run.circuit(name)
        except LensError as error:
            problems.append(f"circuit {name} of {run.id} is not compared: {error}")
    return found, problems


def _totals(circuit: CircuitFile) -> dict[str, float | None]:
    """Writers and edges of the whole graph; the edges from the last point of the curve, all of them."""
    graph, curve = circuit.graph, circuit.faithfulness
    points = zip(curve.get("share", ()), curve.get("edges", ()), strict=True)
    return {
        "nodes": graph.parts,
        "edges": next((edges for share, edges in points if share == 1), None),
    }
