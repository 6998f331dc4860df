"""The constant that a head can be replaced by at the least loss, fitted on some prompts, scored on others.

    a* = argmin_a  mean over the prompts of the loss with the head's output := a

one constant per head for all prompts and positions, found by Adam from the mean or zero, whichever
leaves less loss. Zero and mean ablation
also break what is downstream (it never saw such an input); the optimal constant breaks least, so what
is still lost is the information that the head carried (Li and Janson, Optimal Ablation for
Interpretability, 2024, arXiv 2409.09951).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.models.loaded import LoadedModel
from lens.passes.head_outputs import Source, edited_logits, mean_outputs
from lens.tasks.task import Task

STEPS = 25
_BATCH = 8  # prompts of each step
_RATE = 0.1  # of Adam, in standard deviations of the head's output


def split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the prompts to fit (half of them, rounded down, drawn by `seed`) and to score.

    Raises:
        LensError: fewer than two prompts.
    """
    if n < 2:
        raise LensError(
            "an optimal constant is fitted on one half of the prompts and scored on the other, "
            f"which takes at least two; got {n}"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2].sort().values, order[n // 2 :].sort().values


def check_metric(task: Task) -> None:
    """The task has a loss that can be made smallest.

    Raises:
        LensError: a metric without a gradient, or without a best value.
    """
    if task.metric != "loss":
        why = {
            "accuracy": "has no gradient to fit a constant by",
            "logit_difference": "has no best value: a constant could raise it without end",
        }.get(task.metric, "is no loss of answers")
        raise LensError(
            f"the metric {task.metric!r} {why}; use task.with_metric('loss') for baseline='optimal'"
        )


class Constants:
    """Constants of groups of heads, fitted for each group on its own.

    Args:
        model, task: what is ablated, and on what; the metric is the loss.
        fitted_on: numbers of the prompts to fit.
        steps: of Adam, each on at most 8 prompts, the same for every group.
        seed: of the draws of those.
    """

    def __init__(
        self, model: LoadedModel, task: Task, fitted_on: Tensor, steps: int, seed: int
    ) -> None:
        self._model, self._task, self._rows = model, task, fitted_on
        self._capacity = task.rows_at_once(model)
        generator = torch.Generator().manual_seed(seed)
        size = min(_BATCH, len(fitted_on))
        self._batches = [
            fitted_on[torch.randperm(len(fitted_on), generator=generator)[:size]]
            for _ in range(steps)
        ]
        self._mean, self._spread = _moments(model, task, fitted_on)

    def groups_at_once(self) -> int:
        """Groups whose copies of one batch fit in a forward pass."""
        return max(1, self._capacity // len(self._batches[0]))

    def fit(self, groups: Sequence[Sequence[HeadId]]) -> list[Source]:
        """What to put in place of each group; never worse than mean or zero on the prompts of the fit."""
        means = [[self._mean[layer][head] for layer, head in group] for group in groups]
        zeros = [[torch.zeros_like(mean) for mean in group] for group in means]
        start = self._better(groups, means, zeros)
        spread = [[self._spread[layer][head] for layer, head in group] for group in groups]
        moves = [[torch.zeros_like(mean, requires_grad=True) for mean in group] for group in start]
        moved = [move for group in moves for move in group]

        def constants() -> list[list[Tensor]]:
            return [
                [mean + size * move for mean, size, move in zip(*parts, strict=True)]
                for parts in zip(start, spread, moves, strict=True)
            ]

        optimiser = torch.optim.Adam(moved, lr=_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimiser, 1.0, 0.02, total_iters=len(self._batches)
        )
        with torch.enable_grad():
            for batch in self._batches:
                loss = self._losses(groups, constants(), batch, differentiable=True).sum()
                slopes = torch.autograd.grad(loss, moved)
                for move, slope in zip(moved, slopes, strict=True):
                    move.grad = slope
                optimiser.step()
                schedule.step()
        with torch.no_grad():
            best = self._better(groups, start, constants())
        return [_source(group, mine) for group, mine in zip(groups, best, strict=True)]

    @torch.no_grad()
    def _better(
        self, groups: Sequence[Sequence[HeadId]], a: list[list[Tensor]], b: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Of each group the constants that leave less loss on all prompts of the fit."""
        is_b = self._mean_losses(groups, b) < self._mean_losses(groups, a)
        return [y if wins else x for x, y, wins in zip(a, b, is_b.tolist(), strict=True)]

    def _mean_losses(
        self, groups: Sequence[Sequence[HeadId]], constants: list[list[Tensor]]
    ) -> Tensor:
        """[groups], over all prompts of the fit."""
        chunks = self._rows.split(max(1, self._capacity // len(groups)))
        sums = [self._losses(groups, constants, rows) * len(rows) for rows in chunks]
        return torch.stack(sums).sum(0) / len(self._rows)

    def _losses(
        self,
        groups: Sequence[Sequence[HeadId]],
        constants: list[list[Tensor]],
        rows: Tensor,
        *,
        differentiable: bool = False,
    ) -> Tensor:
        """[groups], mean over the prompts `rows`."""
        sources = [_source(group, mine) for group, mine in zip(groups, constants, strict=True)]
        ids = self._task.given(self._model, rows)
        logits = edited_logits(self._model, ids, groups, sources, differentiable=differentiable)
        return torch.stack([self._task.measure(one, rows).mean() for one in logits])


def _source(group: Sequence[HeadId], constants: Sequence[Tensor]) -> Source:
    def source(layer: int, output: Tensor) -> Tensor:
        instead = torch.zeros_like(output[0, :, 0])  # [heads, value_dim]
        for (at, head), constant in zip(group, constants, strict=True):
            if at == layer:
                instead[head] = constant
        return instead[None, :, None]

    return source


def _moments(
    model: LoadedModel, task: Task, rows: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Of each layer the mean z [heads, value_dim] over the prompts' own positions, and its RMS deviation [heads, 1]."""
    parts = (
        (task.given(model, chunk), None if task.lengths is None else task.own[chunk])
        for chunk in rows.split(task.rows_at_once(model))
    )
    both = mean_outputs(
        model, parts, keep_positions=False, of=lambda z: torch.cat([z, z.square()], -1)
    )
    means, spreads = {}, {}
    for layer, found in both.items():
        mean, squared = found[0, :, 0].chunk(2, -1)
        variance = (squared - mean.square()).clamp(min=0)
        means[layer] = mean.to(model.dtype)
        spreads[layer] = variance.mean(-1, keepdim=True).sqrt().to(model.dtype)
    return means, spreads
