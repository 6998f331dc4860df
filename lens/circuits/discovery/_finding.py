"""`find`: edges scored, circuits of many sizes made of the scores, the smallest faithful one taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch

from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.activations import Baseline
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.mixed import check_edges
from lens.circuits.graph.selection import random_edges
from lens.circuits.scores.methods import EapIg, Hybrid, Method
from lens.circuits.scores.scoring import score_edges
from lens.common.choices import Seed, check_counts
from lens.common.errors import LensError
from lens.common.results import Result, Sentence, with_ends
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

Ranking = Literal["absolute", "signed"]
"""By size, or with what works against the task last."""
_RANKINGS: dict[Ranking, str] = {
    "absolute": "the largest scores by size, also of what works against the task",
    "signed": "the largest signed scores, so what works against the task comes last",
}
_SMALLEST, _SIZES = 0.001, 16  # share of the edges, and number of sizes that are tried
_PROMPTS = 16  # on which the sizes are tried
_DRAWS = 5  # of random circuits


@dataclass(frozen=True, eq=False, repr=False)
class FoundCircuit(Result):
    """A circuit with the scores that it was made of, and the circuits that it was chosen from.

    Attributes:
        circuit: the smallest one that is faithful enough, else the most faithful one.
        scores: of every edge of the graph.
        ranking: how its edges were chosen from them.
        tried: one row per circuit that was tried.
        least: faithfulness that was asked for.
        random: [draws], faithfulness of as many edges drawn at random, on the same prompts.
        prompts: number of those that circuits were tried on, the first of the task.
    """

    circuit: Circuit
    scores: EdgeScores
    ranking: Ranking
    tried: pd.DataFrame = field(repr=False)
    least: float
    random: np.ndarray
    prompts: int

    def table(self) -> pd.DataFrame:
        """One row per circuit tried: `ranking`, `edges`, `writers`, `faithfulness`, `low`, `high`, `kl`, `chosen`."""
        return self.tried

    def findings(self) -> tuple[Sentence, ...]:
        """Its size and faithfulness beside as many random edges (`circuit`), and whether that is what was asked for
        (`enough`)."""
        graph, chosen = self.circuit.graph, self.circuit
        (row,) = self.tried[self.tried["chosen"]].to_dict("records")
        interval = with_ends(row, "faithfulness", ".2f", plain=True)
        size = (
            f"The circuit has {chosen.n:,} of {graph.n:,} edges ({chosen.n / graph.n:.2%}) between "
            f"{len(chosen.nodes)} of {len(graph.writers)} parts ({_RANKINGS[self.ranking]}); on the {self.prompts} of "
            f"{self.scores.n} prompts that it was chosen on its faithfulness is {interval}, that of as many edges at "
            f"random, drawn {len(self.random)} times, {self.random.mean():z.2f} ({self.random.min():z.2f} to "
            f"{self.random.max():z.2f}), its KL divergence from the model {row['kl']:.2g} nats."
        )
        sure = (
            "; one prompt has no interval."
            if np.isnan(row["low"])
            else " on the mean; its interval does not."
            if row["low"] < self.least
            else "."
        )
        enough = (
            f"It is the smallest of {len(self.tried)} circuits tried that reaches {self.least:g}{sure}"
            if row["faithfulness"] >= self.least
            else f"None of {len(self.tried)} circuits tried reaches {self.least:g}; this is the most faithful."
        )
        return Sentence(size, kind="circuit"), Sentence(enough, kind="enough")


def find(
    model: LoadedModel,
    task: Task,
    *,
    method: Method | EapIg | Hybrid = "eap-ig",
    baseline: Baseline | None = None,
    edges: int | None = None,
    faithfulness: float = 0.85,
    seed: Seed = 0,
    progress: bool = True,
) -> FoundCircuit:
    """The circuit of a task: edges scored, and the smallest set of the best that does the task.

    Edges are scored on the task's prompts; circuits of 16 sizes, by size of the scores and by their sign,
    are run on up to 16 of these prompts. What it is worth, other prompts say: `lens.circuits.evaluate`
    and `lens.circuits.checks`.

    Args:
        model, task, method, progress: as in `lens.circuits.score_edges`.
        baseline: what replaces an edge that is left out; None: the corrupt prompt, or the mean where the
            task has none.
        edges: try circuits of this many edges alone.
        faithfulness: share of the task that the circuit shall do.
        seed: of the bootstrap, and of the random circuit beside it.

    Raises:
        LensError: as `score_edges`, more edges than the graph has, or no circuit through a head.

    Example:
        >>> lens.circuits.find(small, lens.tasks.induction(small, 8), progress=False).circuit.n > 0
        True
    """
    if not isinstance(faithfulness, int | float) or not 0 < faithfulness <= 1:
        raise LensError(f"faithfulness must be above 0 and at most 1, got {faithfulness!r}")
    if edges is not None:
        check_counts(edges=edges)
        check_edges(model, edges)
    baseline = baseline or ("mean" if task.corrupt is None else "counterfactual")
    scores = score_edges(model, task, method=method, baseline=baseline, progress=progress)
    sizes = np.geomspace(max(1.0, _SMALLEST * scores.graph.n), scores.graph.n, _SIZES)
    counts = [edges] if edges else np.unique(sizes.round().astype(int)).tolist()
    rankings: list[tuple[Ranking, int]] = [(name, count) for count in counts for name in _RANKINGS]
    made = [scores.top(count, absolute=name == "absolute") for name, count in rankings]
    few = task.take(torch.arange(min(task.n, _PROMPTS)))
    found = run_circuits(
        model, few, np.stack([one.kept for one in made]), scores.ablation, progress=progress
    )
    values = found.faithfulness()
    low, high = found.interval(seed)
    sizes_made = np.array([one.n for one in made])
    enough = np.flatnonzero(values >= faithfulness)
    best = int(enough[np.argmin(sizes_made[enough])] if len(enough) else values.argmax())
    tried = pd.DataFrame(
        {
            "ranking": [name for name, _ in rankings],
            "edges": sizes_made,
            "writers": [len(one.nodes) for one in made],
            "faithfulness": values,
            "low": low,
            "high": high,
            "kl": found.kl.mean(1),
            "chosen": np.arange(len(made)) == best,
        }
    )
    chosen = made[best]
    if not any(name.startswith("a") for name in chosen.nodes):
        raise LensError(
            f"the best {chosen.n or max(counts):,} edges make no circuit that goes through a head; "
            "ask for more edges"
        )
    draw = np.random.default_rng(seed)
    drawn = np.stack([random_edges(scores.graph, chosen.n, draw) for _ in range(_DRAWS)])
    beside = run_circuits(model, few, drawn, scores.ablation, progress=progress)
    return FoundCircuit(
        chosen,
        scores,
        rankings[best][0],
        tried,
        faithfulness,
        beside.faithfulness(),
        few.n,
    )
