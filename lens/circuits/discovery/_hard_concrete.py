"""`learn_masks`: gates on edges (edge pruning) or on writers (subnetwork probing), learned by gradient.

A gate is drawn anew at each step and can be exactly 0 or 1 (Louizos et al. 2018, arXiv 1712.01312):

    s = sigmoid((log u - log(1 - u) + log_alpha) / (2/3)),  u uniform in (0, 1)
    gate = clamp(1.2 s - 0.1, 0, 1)
    P(gate > 0) = sigmoid(log_alpha - 2/3 log(0.1 / 1.1))

An edge with gate g carries `g out + (1 - g) ref`. What is minimised is the task's loss plus either
`penalty * mean P(gate > 0)`, or a Lagrangian term that holds the expected sparsity, mean P(gate = 0), at
a target that rises from 0 during the first half of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

from lens.circuits.graph.activations import Ablation, Baseline
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph, Kv
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.references import References
from lens.circuits.graph.selection import top
from lens.common.choices import Count, Seed, is_number
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

Over = Literal["edges", "nodes"]
OVER: dict[Over, str] = {"edges": "edge-pruning", "nodes": "subnetwork-probing"}
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_SHIFT = _BETA * log(-_LOW / _HIGH)
_START = log(0.9 / 0.1)  # as published: sigmoid(log_alpha) is 0.9


@dataclass(frozen=True, repr=False, eq=False)
class LearnedMasks(Result):
    """Gates after training.

    Attributes:
        graph: all edges.
        over: "edges", or "nodes": one gate for all that a writer writes; `input` has none.
        log_alpha: [gates], of every edge, or of every writer but `input`.
        losses, sparsities: [steps], the task's loss of the drawn gates and the expected sparsity.
        sparsity: the target share of gates that are 0, or None.
        penalty: weight of the mean probability of a gate above 0, or None.
        seed: of gates and batches.
        ablation: what replaces a writer's output.
        metric, task, model: names.
    """

    graph: Graph
    over: Over
    log_alpha: np.ndarray
    losses: np.ndarray
    sparsities: np.ndarray
    sparsity: float | None
    penalty: float | None
    seed: int
    ablation: Ablation
    metric: str
    task: str
    model: str

    @property
    def probabilities(self) -> np.ndarray:
        """[gates], that a gate is above 0."""
        return 1 / (1 + np.exp(_SHIFT - self.log_alpha))

    def scores(self) -> EdgeScores:
        """The probability that each edge's gate is above 0, in one row; 1 for `input` where over nodes."""
        values = self.probabilities
        if self.over == "nodes":
            values = np.array([1.0, *values])[self.graph.ends[1]]
        return EdgeScores(
            self.graph, values[None], OVER[self.over], self.ablation, self.metric, self.task, self.model
        )  # fmt: skip

    def circuit(self) -> Circuit:
        """The most likely gates, as many as the target leaves; with a penalty those above one half.

        Above one half means the gate without noise. Edges on no path from input to logits are dropped.
        """
        if self.sparsity is None:
            gates = (1 / (1 + np.exp(-self.log_alpha))) * (_HIGH - _LOW) + _LOW > 0.5
            goal = f"penalty {self.penalty:g}"
        else:
            kept = round((1 - self.sparsity) * len(self.log_alpha))
            gates = top(self.log_alpha, kept)
            goal = f"{self.sparsity:.1%} of the {self.over} removed"
        if self.over == "nodes":
            gates = np.array([True, *gates])[self.graph.ends[1]]
        made = f"{OVER[self.over]}, {goal}, seed {self.seed}"
        return Circuit(self.graph, gates, self.ablation, self.task, self.model, made).pruned()

    def table(self) -> pd.DataFrame:
        """One row per gate, most likely first: `gate`, `probability`, `log_alpha`."""
        names = self.graph.edges if self.over == "edges" else self.graph.writers[1:]
        rows = pd.DataFrame(
            {"gate": names, "probability": self.probabilities, "log_alpha": self.log_alpha}
        )
        return rows.sort_values("log_alpha", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """How many gates are open and how many undecided, beside the sparsity that was asked for ("gates")."""
        open_ = self.probabilities
        undecided = int(((open_ > 0.1) & (open_ < 0.9)).sum())
        goal = (
            f"a penalty of {self.penalty:g}"
            if self.sparsity is None
            else f"{self.sparsity:.1%} asked for"
        )
        text = (
            f"Of {len(open_):,} gates on {self.over} {int((open_ >= 0.9).sum()):,} are open with a probability of at least 0.9 "
            f"and {undecided:,} undecided (0.1 to 0.9) after {len(self.losses)} steps; {1 - open_.mean():.1%} of them are expected to "
            f"be 0 ({goal}). Of one seed ({self.seed}): others may open other gates."
        )
        return (Sentence(text, kind="gates"),)

    def __repr__(self) -> str:
        return (
            f"LearnedMasks({OVER[self.over]}, {len(self.log_alpha):,} gates, {len(self.losses)} steps: "
            f"expected sparsity {self.sparsities[-1]:.1%}, seed {self.seed}, "
            f"{self.ablation.value} ablation, {self.metric} on {self.task!r}, {self.model})"
        )


def learn_masks(
    model: LoadedModel,
    task: Task,
    *,
    over: Over = "edges",
    sparsity: float | None = None,
    penalty: float | None = None,
    steps: Count = 300,
    rate: float = 0.1,
    start: np.ndarray | None = None,
    seed: Seed = 0,
    baseline: Baseline = "counterfactual",
    kv: Kv = "head",
    batch_size: Count = 8,
    progress: bool = True,
) -> LearnedMasks:
    """Learn which edges or writers a task needs; the model's weights stay as they are.

    Args:
        model: as `lens.load` returns it.
        task: its metric is differentiated; to stay close to the model, `task.with_kl(model)`.
        over: "edges" (Edge Pruning) or "nodes" (Subnetwork Probing).
        sparsity: the share of gates that shall be 0, above 0 and below 1.
        penalty: instead of a target, the price of keeping everything, in units of the metric.
        steps, rate: of Adam.
        start: a number for each gate, such as the sizes of `score_edges`: gates start in this order, the largest where all do
            without it (sigmoid 0.9), the smallest as far on the other side (a warm start by ranks, as scores have heavy tails).
        seed: of gates and batches; the same seed gives the same masks.
        baseline: what replaces a writer: "counterfactual" (the corrupt prompt), "mean" or "zero".
        kv: "head" gives query heads of a group keys and values of their own, "group" does not.
        batch_size: prompts of one step.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an option that is not of these, both or neither of sparsity and penalty, a metric
            without a gradient, or a model whose edges cannot be replaced exactly.

    Reference: Bhaskar et al., Finding Transformer Circuits with Edge Pruning, 2024, arXiv 2406.16778;
        Cao et al., Low-Complexity Probing via Finding Subnetworks, 2021, arXiv 2104.03514.

    Example:
        >>> known = lens.circuits.known.induction_transformer(beta=4)
        >>> learn_masks(known.model, known.task, penalty=1, steps=120).circuit().edges
        ('input->a1.h0<q>', 'a1.h0->logits')
    """
    _check(sparsity, penalty, rate)
    chosen = Ablation(baseline, kv=kv)
    nodes = find_nodes(model, kv=kv)
    graph = nodes.graph
    references = References(nodes, task, chosen)
    draw = torch.Generator().manual_seed(seed)
    gates = graph.n if over == "edges" else len(graph.writers) - 1
    log_alpha = _begun(start, gates).requires_grad_()
    prices = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [log_alpha]}, {"params": [prices], "maximize": True}]
    adam = torch.optim.Adam(groups, lr=rate)
    rows_at_once = min(batch_size, task.n, task.rows_at_once(model))
    order = torch.empty(0, dtype=torch.int64)
    losses, sparsities = [], []
    with advancing(f"{model.name}: {OVER[over]}", steps, progress) as advance:
        for step in range(steps):
            if len(order) < rows_at_once:
                order = torch.cat([order, torch.randperm(task.n, generator=draw)])
            rows, order = order[:rows_at_once].sort().values, order[rows_at_once:]
            reference = references.of(rows)
            with torch.enable_grad():
                gate = draw_gates(log_alpha, draw)
                masks = _masks(graph, over, gate)
                logits = masked_logits(nodes, task.clean[rows], reference, masks)[0]
                loss = -task.sign * task.measure(logits, rows).mean()
                if not loss.requires_grad:
                    raise LensError("the metric has no gradient; use 'logit_difference' or 'loss'")
                expected = 1 - torch.sigmoid(log_alpha - _SHIFT).mean()
                if sparsity is None:
                    assert penalty is not None
                    total = loss.double().cpu() + penalty * (1 - expected)
                else:
                    gap = sparsity * min(1, 2 * (step + 1) / steps) - expected
                    total = loss.double().cpu() + prices[0] * gap + (1 + prices[1]) * gap**2
                found = torch.autograd.grad(total, [log_alpha, prices], materialize_grads=True)
            log_alpha.grad, prices.grad = found
            adam.step()
            losses.append(loss.item())
            sparsities.append(expected.item())
            advance(1)
    learned = log_alpha.detach().numpy().copy()
    return LearnedMasks(
        graph, over, learned, np.array(losses), np.array(sparsities), sparsity, penalty, seed, chosen,
        task.metric, task.name, model.name,
    )  # fmt: skip


def _begun(start: np.ndarray | None, gates: int) -> Tensor:
    """[gates] log_alpha before the first step.

    Raises:
        LensError: another number of them, or some that are no numbers.
    """
    if start is None:
        return torch.full((gates,), _START, dtype=torch.float64)
    if np.shape(start) != (gates,) or not np.isfinite(start).all():
        raise LensError(
            f"start must be {gates:,} numbers, one for each gate; got {np.shape(start)}"
        )
    share = (rankdata(start) - 1) / max(1, gates - 1)
    return torch.from_numpy(_START * (2 * share - 1))


def draw_gates(log_alpha: Tensor, draw: torch.Generator) -> Tensor:
    """Gates of 0 to 1, of the shape of `log_alpha`; both ends have a probability of their own."""
    uniform = torch.rand(log_alpha.shape, generator=draw, dtype=torch.float64)
    uniform = uniform.clamp(1e-12, 1 - 1e-12)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    stretched = torch.sigmoid((noise + log_alpha) / _BETA) * (_HIGH - _LOW) + _LOW
    return stretched.clamp(0, 1)


def _masks(graph: Graph, over: Over, gate: Tensor) -> Tensor:
    """[1, readers, writers], how much of each edge is replaced."""
    reader, writer = (torch.as_tensor(end) for end in graph.ends)
    if over == "nodes":
        gate = torch.cat([gate.new_ones(1), gate])[writer]
    return gate.new_zeros(1, *graph.allowed.shape).index_put(
        (torch.zeros_like(reader), reader, writer), 1 - gate
    )


def _check(sparsity: float | None, penalty: float | None, rate: float) -> None:
    if (sparsity is None) == (penalty is None):
        raise LensError("give either sparsity (a target) or penalty (a price), and not both")
    if sparsity is not None and not 0 < sparsity < 1:
        raise LensError(f"sparsity must be above 0 and below 1, got {sparsity}")
    if penalty is not None and not 0 <= penalty < np.inf:
        raise LensError(f"penalty must be 0 or more, got {penalty}")
    if not (is_number(rate) and 0 < rate < np.inf):
        raise LensError(f"rate must be a positive number, got {rate}")
