"""`EdgeScores`: what each edge of a graph is worth to a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.selection import consistent, greedy, pruned, top
from lens.common.choices import check_choice, is_whole
from lens.common.errors import LensError
from lens.common.results import Result
from lens.stats.intervals import columns

Selection = Literal["top", "greedy", "bootstrap"]


@dataclass(frozen=True, repr=False, eq=False)
class EdgeScores(Result):
    """A score of every edge, in units of the metric: positive = ablating the edge makes the task worse.

    Attributes:
        graph: the edges.
        per_prompt: [prompts, edges]; NaN is an edge that was not scored.
        method: of `score_edges`; or where the scores are from: "acdc" (thresholds), "edge-pruning" and
            "subnetwork-probing" (probabilities of gates), "exact at places" (`PositionScores.edges`), "imported"
            (`from_mib`).
        ablation: what replaces a writer's output.
        metric, task, model: names.
        steps, rule: of the integrated gradients, else None.
        residual: of integrated gradients over inputs: mean over prompts of (sum over the edges from
            `input`) - (metric clean - metric corrupt), signed as the scores; 0 for exact integration.
            None for other methods, whose edges sum to nothing.
        total: mean over prompts of that difference of metrics; None beside `residual` None.
    """

    graph: Graph
    per_prompt: np.ndarray
    method: str
    ablation: Ablation
    metric: str
    task: str
    model: str
    steps: int | None = None
    rule: str | None = None
    residual: float | None = None
    total: float | None = None

    def __post_init__(self) -> None:
        if self.per_prompt.ndim != 2 or self.per_prompt.shape[1] != self.graph.n:
            raise LensError(
                f"per_prompt must be [prompts, {self.graph.n} edges], got the shape "
                f"{list(self.per_prompt.shape)}"
            )

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.per_prompt)

    @property
    def values(self) -> np.ndarray:
        """[edges] mean over the prompts, float64."""
        return self.per_prompt.mean(0, dtype=np.float64)

    def top(
        self,
        count: int,
        *,
        method: Selection = "top",
        absolute: bool = True,
        prune: bool = True,
    ) -> Circuit:
        """The circuit of the edges that count most.

        Args:
            count: of edges, before pruning.
            method: "top", the largest scores wherever they are; "greedy", from the logits upwards, always
                the largest edge whose reader is already in the circuit, so that all are connected;
                "bootstrap", the largest of those whose sign is the same when prompts are drawn anew
                (95 % of 200 draws): fewer than `count` where fewer are sure.
            absolute: by size; False: the signed score, which leaves harmful edges out.
            prune: drop edges that lie on no path from the input to the logits.

        Raises:
            LensError: a count that is not of this graph, or edges without a score.
        """
        if not (is_whole(count) and 0 <= count <= self.graph.n):
            raise LensError(f"top takes 0 to {self.graph.n:,} edges, got {count}")
        check_choice("method", method, Selection)
        values = self.values
        if np.isnan(values).any():
            raise LensError(
                f"{int(np.isnan(values).sum())} edges have no score (NaN), so they cannot be ranked"
            )
        values = np.abs(values) if absolute else values
        if method == "bootstrap":
            sure = consistent(self.per_prompt)
            kept = top(self.graph, np.where(sure, values, -np.inf), count) & sure
        else:
            kept = (greedy if method == "greedy" else top)(self.graph, values, count)
        made = f"{self.method}, {method} {count}{'' if absolute else ' signed'}{', pruned' * prune}"
        kept = pruned(self.graph, kept) if prune else kept
        return Circuit(self.graph, kept, self.ablation, self.task, self.model, made)

    def table(self, *, count: int | None = None, seed: int = 0) -> pd.DataFrame:
        """One row per edge, largest score first.

        Args:
            count: only so many edges, the largest by size.
            seed: of the bootstrap.

        Columns: `edge`, `writer`, `reader`, `value`, `stderr`, `low`, `high` (95 % bootstrap interval
        over prompts, draws by `seed`; NaN for one prompt), `n`.
        """
        values = self.values
        chosen = np.argsort(-np.abs(values), kind="stable")[:count]
        reader, writer = (end[chosen] for end in self.graph.ends)
        units = self.per_prompt[:, chosen].astype(float)
        several = self.n > 1
        spread = units.std(0, ddof=1) / np.sqrt(self.n) if several else np.full(len(chosen), np.nan)
        rows = pd.DataFrame(
            {
                "edge": [self.graph.edges[edge] for edge in chosen],
                "writer": [self.graph.writers[number] for number in writer],
                "reader": [self.graph.readers[number] for number in reader],
                **columns("value", units.T, seed, plain=True),
                "n": self.n,
            }
        )
        rows.insert(4, "stderr", spread)
        return rows.sort_values("value", ascending=False, kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        values = self.values
        order = np.argsort(-np.nan_to_num(np.abs(values), nan=-1.0))[:3]
        shown = ", ".join(f"{self.graph.edges[edge]} {values[edge]:.3g}" for edge in order)
        steps = f", {self.steps} steps ({self.rule})" if self.steps else ""
        residual = (
            ""
            if self.residual is None
            else f"; completeness residual {self.residual:.2g} of {self.total:.3g}"
        )
        return (
            f"EdgeScores({self.method}{steps}, {self.ablation.value} ablation, on {self.task!r}, "
            f"{self.model}: {self.graph.n:,} edges, {self.n} prompts, {self.metric}{residual}; "
            f"largest {shown})"
        )
