"""Ways to score and choose edges, on models whose circuit is known and on `induction-2l`.

    python tests/benchmarks/circuit_methods.py [--write]

prints CIRCUIT_METHODS.md, and writes it with `--write`. On known circuits: area under the curve of the edges that show on each
task. On `induction-2l`: edges are scored on 16 prompts and circuits run on 16 others; a circuit's size is the smallest
of 12 with a faithfulness of 0.85 there, and the overlap that of two halves of the prompts at that size.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import lens
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.known import PROGRAMS, induction_transformer, tracr

METHODS = ("eap", "eap-ig", "eap-ig-activations", "eap-ig-stages", "exact", "hybrid")
_TABLE = Path(__file__).with_name("CIRCUIT_METHODS.md")
_ENOUGH = 0.85


def main() -> None:
    """Print the page."""
    text = f"""# Methods that find circuits

`python tests/benchmarks/circuit_methods.py`: float32, CPU. `hybrid` is the mean of eap-ig, eap and eap-ig-activations at equal scale.

Known circuits: chance that an edge that shows is scored above another, mean over the tasks of each model.

{known_circuits()}

`induction-2l`, induction, scored on 16 prompts and run on 16 others: CPR (area under the faithfulness of signed circuits, higher is
better), CMD (distance of those by size from 1, lower is better); edges of the smallest of 12 circuits that reaches {_ENOUGH}, by the
largest scores and by those of them whose sign is sure (`bootstrap`); Jaccard index of the circuits of this size from two halves of the prompts.

{trained()}
"""
    print(text)
    if "--write" in sys.argv:
        _TABLE.write_text(text, encoding="utf-8")


def known_circuits() -> str:
    """One row per model."""
    models = [induction_transformer(beta=beta) for beta in (4, 8, 30)]
    models += [tracr(name) for name in PROGRAMS]
    lines = [f"| | {' | '.join(METHODS)} |", "|---" + "|--:" * len(METHODS) + "|"]
    for known in models:
        cells = []
        for method in METHODS:
            found = [
                lens.circuits.checks.recovery(
                    lens.circuits.score_edges(known.model, task, method=method, progress=False),
                    known.visible.get(name) or known.edges,
                ).auroc
                for name, task in known.tasks.items()
            ]
            cells.append(f"{np.mean(found):.2f}")
        lines.append(f"| {known.model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trained() -> str:
    """One row per method, and the core of all of them."""
    model = lens.load("induction-2l")
    task, others = lens.tasks.induction(model, 16), lens.tasks.induction(model, 16, seed=1)
    lines = [
        "| | CPR | CMD | edges, largest | edges, bootstrap | overlap of halves |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    views, ablation = [], None
    for method in METHODS:
        scores = lens.circuits.score_edges(model, task, method=method, progress=False)
        ablation = scores.ablation
        judged = lens.circuits.evaluate(model, others, scores, progress=False)
        sizes = {one: smallest(model, others, scores, one) for one in ("top", "bootstrap")}
        count = sizes["top"] or scores.graph.n
        halves = [
            lens.circuits.score_edges(model, task.take(rows), method=method, progress=False).top(
                count
            )
            for rows in (torch.arange(8), torch.arange(8, 16))
        ]
        views.append(scores.top(count))
        shown = [str(sizes[one] or "–") for one in ("top", "bootstrap")]
        overlap = lens.circuits.checks.jaccard(halves).mean
        lines.append(
            f"| {method} | {judged.cpr:.2f} | {judged.cmd:.2f} | {' | '.join(shown)} | {overlap:.2f} |"
        )
    agreed = lens.circuits.checks.consensus(views)
    best = lens.circuits.score_edges(model, task, method="eap-ig", progress=False)
    kept = np.stack([agreed.core.kept, best.top(max(1, agreed.core.n), prune=False).kept])
    assert ablation is not None
    faithful = run_circuits(model, others, kept, ablation, progress=False).faithfulness()
    lines.append("")
    lines.append(
        f"{agreed.findings()[0]} The core has a faithfulness of {faithful[0]:.2f}, as many edges with the largest eap-ig "
        f"scores {faithful[1]:.2f}."
    )
    return "\n".join(lines)


def smallest(model, task, scores, method: str) -> int | None:
    """Edges of the smallest circuit that is faithful enough."""
    counts = np.unique(np.geomspace(2, scores.graph.n, 12).round().astype(int))
    made = [scores.top(int(count), method=method) for count in counts]
    kept = np.stack([one.kept for one in made])
    values = run_circuits(model, task, kept, scores.ablation, progress=False).faithfulness()
    sizes = [one.n for one, value in zip(made, values, strict=True) if value >= _ENOUGH]
    return min(sizes, default=None)


if __name__ == "__main__":
    main()
