"""What is put in place of each writer's output: of the paired prompts, a mean, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lens.circuits.graph.activations import Ablation, Activations, read_activations
from lens.circuits.graph.mixed import Mixed
from lens.circuits.graph.nodes import Nodes
from lens.tasks.task import Task


def outputs_of(nodes: Nodes | Mixed, ids: Tensor) -> Activations:
    """What every writer writes in a plain run of these prompts."""
    return nodes.outputs(ids) if isinstance(nodes, Mixed) else read_activations(nodes, ids)[1]


def own_positions(task: Task, count: int) -> Tensor:
    """bool [prompts, count], where each prompt has a token of its own; of pictures all `count` positions are."""
    return (
        torch.ones(task.n, count, dtype=torch.bool) if task.clean.is_floating_point() else task.own
    )


def shares_in_mean(task: Task, rows: Tensor, hidden: Tensor) -> Tensor:
    """[rows, tokens, 1], what each prompt counts in the mean at a position: alike all that have a token of their own there.

    Args:
        task, rows: the prompts, and which of them.
        hidden: [rows, tokens, d_model] of these, for precision and device.
    """
    own = own_positions(task, hidden.shape[1])
    return (own[rows].to(hidden) / own.sum(0).clamp(min=1).to(hidden))[..., None]


class References:
    """What is put in place of each writer's output, for any rows of a task.

    Args:
        nodes: of the model.
        task, ablation: whose prompts, and what of them.

    Raises:
        LensError: no corrupt prompts for the counterfactual ablation.
    """

    def __init__(self, nodes: Nodes | Mixed, task: Task, ablation: Ablation) -> None:
        task.check(nodes.model)
        self._nodes, self._task, self._ablation = nodes, task, ablation
        self._mean: Activations | None = None
        if ablation.value == "counterfactual":
            task.corrupt_or_refuse()

    def of(self, rows: Tensor) -> Activations:
        """Reference outputs of these prompts, or one row for all."""
        if self._ablation.value == "counterfactual":
            return outputs_of(self._nodes, self._task.corrupt_or_refuse()[rows])
        if self._mean is None:
            self._mean = self._over_prompts()
        return self._mean

    def _over_prompts(self) -> Activations:
        task, total = self._task, None
        for rows in task.chunks(min(16, task.rows_at_once(self._nodes.model))):
            found = outputs_of(self._nodes, task.clean[rows])
            share = shares_in_mean(task, rows, found.input)

            def shared(part: Tensor, share: Tensor = share) -> Tensor:
                weighted = part * (share if part.dim() == 3 else share[:, None])
                return weighted.sum(0, keepdim=True)

            summed = found.each(shared)
            total = summed if total is None else summed.minus(total.times(-1))
            if self._ablation.value == "zero":
                return total.times(0)
        assert total is not None
        return total
