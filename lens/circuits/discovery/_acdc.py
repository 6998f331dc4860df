"""`acdc`: edges taken out one after another, each for good unless the task gets worse by a threshold.

Readers are visited from the logits down. Of each reader, one incoming edge after another is ablated on
top of all that are already gone, and stays ablated if

    loss(with it ablated) - loss(before) < threshold

The rule is signed as published: an edge whose removal improves the task always goes. Inputs of a node
that nobody reads any more go untested. The result depends on the order (of two edges that stand in for
each other one is kept), so the order is an argument.

Runs are batched by a guess that is then checked: the next edges are all ablated cumulatively in one
pass, and what follows the first edge that has to be kept is thrown away and run again without it. The
outcome is that of one edge at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.circuits.checks.evaluation import check_finite
from lens.circuits.graph.activations import Ablation, Baseline
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph, Kv
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import Nodes, find_nodes
from lens.circuits.graph.references import References
from lens.common.choices import Count, Seed, check_counts
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.models.loaded import LoadedModel
from lens.tasks.metrics import METRICS
from lens.tasks.task import Task

Order = Literal["reverse", "forward", "random"]
_ROWS, _COPIES = 16, 128  # prompts of one pass, and rows with copies


@dataclass(frozen=True, repr=False, eq=False)
class Acdc(Result):
    """Circuits of one or several thresholds.

    Attributes:
        graph: all edges.
        thresholds: in units of the metric, ascending.
        kept: [thresholds, edges] bool.
        loss: [thresholds], mean over prompts of the circuit's loss (KL and loss as they are, metrics of
            which more is better with the opposite sign).
        whole: the loss with no edge ablated.
        runs: [thresholds], edges that were tested, each a run over all prompts.
        order, seed: in which the edges were visited.
        absolute: whether the size of the change is compared with the threshold.
        ablation: what replaces a writer's output.
        metric, task, model: names.
    """

    graph: Graph
    thresholds: tuple[float, ...]
    kept: np.ndarray
    loss: np.ndarray
    whole: float
    runs: np.ndarray
    order: str
    seed: int
    absolute: bool
    ablation: Ablation
    metric: str
    task: str
    model: str

    def circuit(self, threshold: float | None = None) -> Circuit:
        """The edges that a threshold keeps; the only one if it is not given.

        Raises:
            LensError: a threshold that was not run, or none of several.
        """
        if threshold is None and len(self.thresholds) == 1:
            threshold = self.thresholds[0]
        if threshold not in self.thresholds:
            raise LensError(
                f"no circuit was made with the threshold {threshold}; choose one of "
                f"{', '.join(f'{value:g}' for value in self.thresholds)}"
            )
        kept = self.kept[self.thresholds.index(threshold)]
        made = f"acdc, threshold {threshold:g}, {self.order} order"
        return Circuit(self.graph, kept, self.ablation, self.task, self.model, made)

    def scores(self) -> EdgeScores:
        """The largest threshold that keeps each edge, 0 for one that none keeps.

        One row, since a threshold is of the mean over all prompts: there are no intervals.

        Raises:
            LensError: edges that the threshold 0 alone keeps, whose score would be that of edges that none keeps.
        """
        at_0 = self.kept.any(0) & ~self.kept[np.array(self.thresholds) > 0].any(0)
        if at_0.any():
            raise LensError(
                f"{at_0.sum():,} edges are kept by the threshold 0 alone, and would score 0 as those that none keeps; leave "
                "0 out of the thresholds"
            )
        limits = np.array(self.thresholds)[:, None]
        values = np.where(self.kept, limits, 0).max(0, keepdims=True)
        return EdgeScores(
            self.graph, values, "acdc", self.ablation, self.metric, self.task, self.model
        )

    def table(self) -> pd.DataFrame:
        """One row per threshold: `threshold`, `edges`, `share`, `loss`, `whole` (loss of the model), `runs`."""
        edges = self.kept.sum(1)
        return pd.DataFrame(
            {
                "threshold": self.thresholds,
                "edges": edges,
                "share": edges / self.graph.n,
                "loss": self.loss,
                "whole": self.whole,
                "runs": self.runs,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many edges the thresholds keep, and what their circuits lose beside the whole model ("circuits")."""
        several = len(self.thresholds) > 1
        kept = "; ".join(
            f"threshold {self.thresholds[at]:g} keeps {self.kept[at].sum():,} of {self.graph.n:,} edges, with a loss of "
            f"{self.loss[at]:.3g}"
            for at in (0, -1)[: 1 + several]
        )
        turned = (
            ", less is better"
            if METRICS.get(self.metric) == -1
            else " turned so that less is better"
        )
        text = (
            f"On {self.task} {kept} ({self.metric}{turned}; the whole model's is {self.whole:.3g}, both on the prompts "
            f"that edges were tested on). Edges were visited in {self.order} order; of two that stand in for each "
            "other one is kept."
        )
        return (Sentence(text, kind="circuits"),)

    def __repr__(self) -> str:
        sizes = self.kept.sum(1)
        return (
            f"Acdc({len(self.thresholds)} thresholds from {self.thresholds[0]:g} to "
            f"{self.thresholds[-1]:g} keep {sizes.max():,} to {sizes.min():,} of {self.graph.n:,} edges; "
            f"{self.order} order, {self.ablation.value} ablation, {self.metric} on {self.task!r}, "
            f"{self.model})"
        )


def acdc(
    model: LoadedModel,
    task: Task,
    thresholds: float | Sequence[float],
    *,
    order: Order = "reverse",
    seed: Seed = 0,
    absolute: bool = False,
    baseline: Baseline = "counterfactual",
    kv: Kv = "head",
    batch_size: Count = _ROWS,
    progress: bool = True,
) -> Acdc:
    """Automatic circuit discovery: one circuit per threshold, each from all edges.

    Published runs minimise the KL divergence to the model: `task.with_kl(model)`. With a single kind of
    corrupt prompt the circuit never has what both prompts have in common; take the union over tasks.

    Args:
        model: as `lens.load` returns it.
        task: any metric; it needs no gradient.
        thresholds: how much worse the task may get by one edge, in units of the metric, not negative.
        order: of the edges into one reader: "reverse" (last writer first, as published), "forward", or
            "random", which also mixes the readers of one layer's attention.
        seed: of the random order.
        absolute: keep edges whose removal improves the task by the threshold, too.
        baseline: what replaces a writer: "counterfactual" (the corrupt prompt), "mean" or "zero".
        kv: "head" gives query heads of a group keys and values of their own, "group" does not.
        batch_size: prompts in one pass; changes memory and no result.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown order or baseline, thresholds that are none, a metric that is not a
            number, or a model whose edges cannot be replaced exactly.

    Reference: Conmy et al., Towards Automated Circuit Discovery for Mechanistic Interpretability, 2023,
        arXiv 2304.14997.

    Example:
        >>> known = lens.circuits.known.induction_transformer(beta=4)
        >>> acdc(known.model, known.task, 0.05).circuit().edges
        ('input->a1.h0<q>', 'a1.h0->logits')
    """
    given = (thresholds,) if isinstance(thresholds, int | float) else tuple(thresholds)
    limits = tuple(sorted({float(value) for value in given}))
    if not limits or not all(0 <= value < np.inf for value in limits):
        raise LensError(f"thresholds must be finite numbers of 0 or more, got {thresholds!r}")
    chosen = Ablation(baseline, kv=kv)
    nodes = find_nodes(model, kv=kv)
    graph = nodes.graph
    rows = min(batch_size, task.rows_at_once(model))
    losses = _Losses(nodes, task, References(nodes, task, chosen), rows)
    queue = visiting_order(graph, order, seed)
    found = []
    with advancing(f"{model.name}: acdc", len(limits) * graph.n, progress) as advance:
        for limit in limits:
            found.append(_eliminate(graph, queue, losses, limit, absolute, advance))
    kept, loss, runs = map(np.array, zip(*found, strict=True))
    return Acdc(
        graph, limits, kept, loss, losses.whole, runs, order, seed, absolute, chosen, task.metric,
        task.name, model.name,
    )  # fmt: skip


def visiting_order(graph: Graph, order: str, seed: int = 0) -> np.ndarray:
    """Numbers of the edges as they are visited: readers from the logits down, writers by `order`."""
    check_counts(0, seed=seed)
    readers = np.arange(len(graph.readers))
    draw = np.random.default_rng(seed)
    if order == "random":
        for layer in range(graph.layers):
            draw.shuffle(readers[graph.attention_readers(layer)])
    into = [np.flatnonzero(graph.ends[0] == reader) for reader in readers[::-1]]
    if order == "reverse":
        into = [edges[::-1] for edges in into]
    elif order == "random":
        into = [draw.permutation(edges) for edges in into]
    return np.concatenate(into)


class _Losses:
    """Mean loss over all prompts with sets of edges ablated."""

    def __init__(self, nodes: Nodes, task: Task, references: References, rows: int) -> None:
        self._nodes, self._task = nodes, task
        self._chunks = [(chunk, references.of(chunk)) for chunk in task.chunks(rows)]
        self.at_once = max(1, _COPIES // min(rows, task.n))
        self.whole = float(self(np.zeros((1, nodes.graph.n), bool))[0])

    def __call__(self, ablated: np.ndarray) -> np.ndarray:
        """[sets] of ablated [sets, edges]."""
        graph, task = self._nodes.graph, self._task
        masks = torch.as_tensor(graph.dense(ablated.astype(float)))
        total = np.zeros(len(ablated))
        with torch.no_grad():
            for rows, reference in self._chunks:
                logits = masked_logits(self._nodes, task.clean[rows], reference, masks)
                values: list[Tensor] = [task.measure(part, rows) for part in logits]
                total -= task.sign * torch.stack(values).double().sum(1).cpu().numpy()
        check_finite(total, whole=not ablated.any())
        return total / task.n


def _eliminate(
    graph: Graph,
    queue: np.ndarray,
    losses: _Losses,
    threshold: float,
    absolute: bool,
    advance: Callable[[int], None],
) -> tuple[np.ndarray, float, int]:
    """[edges] kept, the loss of what is kept, and how many edges were tested."""
    ablated, current, at, runs, guesses = np.zeros(graph.n, bool), losses.whole, 0, 0, 1
    while at < len(queue):
        before = at
        places, sets, guess = _next_sets(graph, queue, at, ablated, guesses)
        right = True
        for place, tried, loss in zip(places, sets, losses(sets) if places else (), strict=True):
            ablated, at, runs = tried.copy(), place + 1, runs + 1
            change = float(loss) - current
            right = (abs(change) if absolute else change) < threshold
            if not right:
                ablated[queue[place]] = False
                break
            current = float(loss)
        if right and len(places) < guesses:  # all that is left has nobody to read it
            ablated, at = guess, len(queue)
        guesses = min(losses.at_once, 2 * guesses) if right else max(1, guesses // 2)
        advance(at - before)
    return ~ablated, current, runs


def _next_sets(
    graph: Graph, queue: np.ndarray, start: int, ablated: np.ndarray, count: int
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The next `count` edges to test if all of them go: places in the queue, the ablated edges
    [tests, edges] with each of them, and at the end. Inputs of unread nodes go untested."""
    reader, writer = graph.ends
    guess = ablated.copy()
    read = np.bincount(writer[~guess], minlength=len(graph.writers))
    places: list[int] = []
    sets: list[np.ndarray] = []
    for place in range(start, len(queue)):
        edge = queue[place]
        fed = graph.feeds[reader[edge]]
        tested = not fed or any(read[node] for node in fed)
        if tested and len(places) == count:
            break
        guess[edge] = True
        read[writer[edge]] -= 1
        if tested:
            places.append(place)
            sets.append(guess.copy())
    return places, np.stack(sets) if sets else np.empty((0, graph.n), bool), guess
