"""HISP: head importance scores for pruning, from gates on what each head reads and each MLP writes.

Michel et al. put a gate on each head's output; that score is `lens.heads.importance(method="gradient",
absolute="prompt")`. To find circuits, Conmy et al. put gates on query, key and value of each head and on
each MLP, which lead from the task's prompt (1) to the corrupt one (0). A gate at 1 sees what an infinitely
small step does: where a softmax is saturated, the gates of query and key see nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.circuits.graph.activations import Ablation, PlainVisitor
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.graph import Graph, Kv
from lens.circuits.graph.nodes import Nodes, find_nodes, visit
from lens.circuits.graph.selection import top
from lens.common.choices import Count, is_whole, shown
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, counted
from lens.models.loaded import LoadedModel
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many_told
from lens.tasks.task import Task

Baseline = Literal["counterfactual", "zero"]


@dataclass(frozen=True, repr=False, eq=False)
class GateScores(Result):
    """How fast the metric changes when the gate of a node begins to close; without a sign.

    Attributes:
        graph: its readers but `logits` are the nodes: `a0.h1<q>`, `a0.h1<k>`, `a0.h1<v>`, `m0`.
        per_prompt: [prompts, nodes], |slope| of each prompt, in units of the metric.
        normalized: whether `values` are divided by their length in each layer.
        ablation: what a closed gate lets through.
        metric, task, model: names.
    """

    graph: Graph
    per_prompt: np.ndarray
    normalized: bool
    ablation: Ablation
    metric: str
    task: str
    model: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names, in the order of `per_prompt`."""
        return self.graph.readers[:-1]

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.per_prompt)

    @property
    def values(self) -> np.ndarray:
        """[nodes] mean over the prompts; normalised so that each layer's have the length 1 (or 0)."""
        return self.per_prompt.mean(0) / self._lengths()

    def _lengths(self) -> np.ndarray:
        """[nodes] what the mean of each is divided by."""
        if not self.normalized:
            return np.ones(len(self.nodes))
        lengths = np.sqrt(np.bincount(self._layers, self.per_prompt.mean(0) ** 2))
        return np.where(lengths > 0, lengths, 1)[self._layers]

    @property
    def _layers(self) -> np.ndarray:
        return np.repeat(np.arange(self.graph.layers), len(self.nodes) // self.graph.layers)

    def top(self, count: int, *, prune: bool = True) -> Circuit:
        """The circuit of the nodes that count most: all edges between them, `input` and `logits`.

        A head writes if any of its query, key and value is among them.

        Args:
            count: of nodes, before pruning.
            prune: drop edges that lie on no path from the input to the logits.

        Raises:
            LensError: a count that is not of this graph, or nodes without a score.
        """
        graph, values = self.graph, self.values
        if not (is_whole(count) and 0 <= count <= len(self.nodes)):
            raise LensError(f"top takes 0 to {len(self.nodes):,} nodes, got {shown(count)}")
        if np.isnan(values).any():
            raise LensError(
                f"{int(np.isnan(values).sum())} nodes have no score (NaN), so they cannot be ranked"
            )
        chosen = np.append(top(values, count), True)  # and the logits
        writes = np.zeros(len(graph.writers), bool)
        writes[0] = True
        for reader in np.flatnonzero(chosen):
            writes[list(graph.feeds[reader])] = True
        reader, writer = graph.ends
        kept = chosen[reader] & writes[writer]
        made = f"hisp, top {count} nodes"
        found = Circuit(graph, kept, self.ablation, self.task, self.model, made)
        return found.pruned() if prune else found

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per node, largest first.

        Columns: `node`, `layer`, `value`, `low`, `high` (95 % bootstrap interval over prompts, the
        layers' lengths kept; NaN for one prompt), `n`.
        """
        value = columns(
            "value", (self.per_prompt / self._lengths()).T, seed, plain=True, shares=False
        )
        table = pd.DataFrame({"node": self.nodes, "layer": self._layers, **value, "n": self.n})
        return table.sort_values("value", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """The gates on which most hangs, beside the median one ("largest")."""
        table, many = self.table(), len(self.nodes)
        best = ", ".join(
            f"{row['node']} {of_many_told(row, 'value', '.3g', many, self.n, plain=True, least=0)}"
            for row in table.head(3).to_dict("records")
        )
        several = self.n > 1
        unit = "normalised by layer" if self.normalized else f"in units of {self.metric}"
        text = (
            f"On {self.task} ({counted(self.n, 'prompt')}) the metric changes fastest with the gates of {best}, {unit} and "
            f"without a sign{' (intervals as of the largest of all)' * several}; the median of {many:,} gates has "
            f"{table['value'].median():.3g}."
        )
        return (Sentence(text, kind="largest"),)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.node} {row.value:.3g}" for row in self.table().head(3).itertuples())
        unit = "normalised by layer" if self.normalized else self.metric
        return (
            f"GateScores(hisp, {self.ablation.value} ablation, on {self.task!r}, {self.model}: "
            f"{len(self.nodes):,} nodes, {self.n} prompts, {unit}; top {best})"
        )


def hisp(
    model: LoadedModel,
    task: Task,
    *,
    baseline: Baseline = "counterfactual",
    normalize: bool = True,
    kv: Kv = "head",
    batch_size: Count = 8,
    progress: bool = True,
) -> GateScores:
    """Score each head's query, key and value and each MLP by a gate on it.

        x(gate) = reference + gate (x - reference),   score = |d metric / d gate| at gate 1
                = |sum over tokens of (x - reference) · d metric / d x|

    One forward and one backward pass per batch. With the reference 0 and without normalising, the score
    of `<v>` is Michel et al.'s score of the head, since its output is linear in its values.

    Args:
        model: as `lens.load` returns it.
        task: its metric is differentiated.
        baseline: what a closed gate lets through: "counterfactual" (the corrupt prompt) or "zero".
        normalize: divide the scores of each layer by their length, so that layers compare.
        kv: "head" gives query heads of a group gates of their own for key and value, "group" one.
        batch_size: prompts in one pass; changes memory and no score.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown baseline, a task without what it needs, a metric without a gradient or one
            that is flat, or a model whose nodes are not known.

    Reference: Michel, Levy, Neubig 2019, arXiv 1905.10650; for circuits, Conmy et al. 2023, arXiv
        2304.14997.

    Example:
        >>> lens.circuits.scores.hisp(model, task).top(40)
    """
    if task.is_flat:
        raise LensError(
            f"the metric {task.metric!r} is at its best where the model is as it is, so that its gradient "
            "there is 0 and gates say nothing; use another metric"
        )
    task.check(model)
    nodes, found = find_nodes(model, kv=kv), []
    corrupt = task.corrupt_or_refuse() if baseline == "counterfactual" else None
    with advancing(f"{model.name}: hisp", task.n, progress) as advance:
        for rows in task.chunks(min(batch_size, task.rows_at_once(model))):
            reference = None
            if corrupt is not None:
                with torch.no_grad():
                    reference = _Gated(nodes)
                    visit(nodes, corrupt[rows], reference)
            found.append(_slopes(nodes, task, rows, reference))
            advance(len(rows))
    return GateScores(
        nodes.graph, np.concatenate(found), normalize, Ablation(baseline, kv=kv), task.metric,
        task.name, model.name,
    )  # fmt: skip


class _Gated(PlainVisitor):
    """Keeps what gates are on: per layer q, k, v [rows, tokens, readers, head_dim] and the MLP's output."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(nodes)
        self.kept: list[Tensor] = []

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden.detach().requires_grad_(torch.is_grad_enabled())

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = super().project(layer, residual)
        self.kept += made
        return made

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        self.kept.append(output)
        return output


def _slopes(nodes: Nodes, task: Task, rows: Tensor, reference: _Gated | None) -> np.ndarray:
    """[rows, nodes]."""
    gated = _Gated(nodes)
    with torch.enable_grad():
        values = task.measure(visit(nodes, task.clean[rows], gated), rows)
        if not values.requires_grad:
            raise LensError("the metric has no gradient; use 'logit_difference' or 'loss'")
        slopes = torch.autograd.grad(values.sum(), gated.kept)
    found = []
    for number, (made, slope) in enumerate(zip(gated.kept, slopes, strict=True)):
        change = made.detach() - (0 if reference is None else reference.kept[number])
        product = (change * slope).double().sum((1, -1))  # [rows] of an MLP, [rows, readers]
        found.append(product.abs().reshape(len(rows), -1).cpu().numpy())
    return np.concatenate(found, 1)
