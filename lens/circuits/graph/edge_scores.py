"""`EdgeScores`: what each edge of a graph is worth to a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.selection import consistent, greedy, top
from lens.common.choices import check_choice, check_counts, is_whole
from lens.common.errors import LensError
from lens.common.results import Result, Sentence, by_size, counted
from lens.stats.intervals import columns
from lens.stats.verdicts import clear_told, leave_out_0, of_many_told

Selection = Literal["top", "greedy", "bootstrap"]
_NAMED = 4  # edges that a sentence names
_ROUNDING = 1e-6  # of the largest score
_GATE = "the probability that its gate is open"
_UNITS = {
    "acdc": "the largest threshold that keeps the edge",
    "edge-pruning": _GATE,
    "subnetwork-probing": _GATE,
    "atp*-grad-drop": "mean sizes in units of {metric}, without a sign",
}
"""Of scores that are never below 0."""
_IMPORTED = "in the units of their file, which does not say what the sign means"
_SIGNED = "in units of {metric}; positive: the task goes worse without the edge"


@dataclass(frozen=True, repr=False, eq=False)
class EdgeScores(Result):
    """A score of every edge, in units of the metric: positive = ablating the edge makes the task worse.

    Scores of "atp*-grad-drop" are mean sizes without a sign, those of "acdc" thresholds, those of learned masks
    probabilities, and imported ones what their file holds.

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
            `input`) - (metric clean - metric with the reference as input), signed as the scores; 0 for exact integration.
            None for other methods, whose edges sum to nothing, of models with mixers, and of scores from a file.
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
            absolute: by size; False: by the signed score, so that edges of 0 and harmful ones come last.
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
            kept = top(np.where(sure, values, -np.inf), count) & sure
        elif method == "greedy":
            kept = greedy(self.graph, values, count)
        else:
            kept = top(values, count)
        made = f"{self.method}, {method} {count}{'' if absolute else ' signed'}"
        found = Circuit(self.graph, kept, self.ablation, self.task, self.model, made)
        return found.pruned() if prune else found

    def table(self, *, count: int | None = None, seed: int = 0) -> pd.DataFrame:
        """One row per edge, largest score first.

        Args:
            count: only so many edges, the largest by size.
            seed: of the bootstrap.

        Raises:
            LensError: a number of edges that is none.

        Columns: `edge`, `writer`, `reader`, `value`, `stderr`, `low`, `high` (95 % bootstrap interval
        over prompts, draws by `seed`; NaN for one prompt), `n`.
        """
        if count is not None:
            check_counts(count=count)
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
                **columns("value", units.T, seed, plain=True, shares=False),
                "n": self.n,
            }
        )
        rows.insert(4, "stderr", spread)
        return rows.sort_values("value", ascending=False, kind="stable", ignore_index=True)

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """The largest edges by size beside the median one ("largest"), of scores with a sign how many intervals leave
        out 0 ("chance"), and how far the integral is off ("integral").

        Args:
            seed: of the bootstrap.
        """
        sizes = np.abs(self.values)
        known = int(np.isfinite(sizes).sum())
        if not known:
            return ()
        several, signed = self.n > 1, self.method not in _UNITS
        seen = int((sizes > _ROUNDING * np.nanmax(sizes)).sum())
        rows = self.table(count=max(seen * (several and signed), min(known, _NAMED)), seed=seed)
        rows = by_size(rows, "value")
        form, least = ("+z.3g", -np.inf) if signed else (".3g", 0)
        best = "; ".join(
            f"{row['edge'].replace('->', ' to ')} "
            + of_many_told(row, "value", form, known, self.n, plain=True, least=least)
            for row in rows.head(_NAMED).to_dict("records")
        )
        unit = _UNITS.get(self.method, _IMPORTED if self.method == "imported" else _SIGNED)
        unit = unit.format(metric=self.metric)
        said = [
            Sentence(
                f"On {self.task} ({counted(self.n, 'prompt')}) {self.method} scores the edges {best} highest by size"
                f"{' (intervals as of the largest of all)' * several}, {unit}. The median size of {known:,} edges is "
                f"{np.nanmedian(sizes):.2g}.",
                kind="largest",
            )
        ]
        if several and signed:
            largest = rows.head(seen)
            clear = int(leave_out_0(largest["low"], largest["high"]).sum())
            text = f"{clear_told(clear, known, 'edges')}."
            said.append(Sentence(text, kind="chance"))
        if self.residual is not None and self.total:
            share = abs(self.residual / self.total)
            text = (
                f"The edges from the input sum to {self.total + self.residual:.3g} where they should to "
                f"{self.total:.3g}: the integral of {self.steps} steps is {share:.0%} off"
                f"{', so more steps would help' if share > 0.05 else ''}."
            )
            said.append(Sentence(text, kind="integral"))
        return tuple(said)

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
