"""What is put in place of a head: zero, a mean, another prompt's output, the corrupt prompt's, a constant."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lens.common.choices import check_choice, check_counts
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.heads.measures import optimal
from lens.heads.measures.methods import Baseline as BaselineName
from lens.heads.measures.scores import Intervention
from lens.models.loaded import LoadedModel
from lens.passes.head_outputs import Source, mean_outputs, read_heads
from lens.tasks.task import Task


class Baseline:
    """Replacement of head outputs for the prompts of one task.

    Means are taken once, over all prompts; what comes from single prompts is run when it is needed,
    so memory is that of the prompts in one forward pass.

    Args:
        model, task: what is ablated, and on what.
        name: one of `methods.Baseline`.
        seed: of the draw of "resample", and of the halves and batches of "optimal".
        steps: of the fit of "optimal"; None: 25.

    Raises:
        LensError: an unknown name, no corrupt prompts, nothing to draw from, no loss to fit to, or
            steps where nothing is fitted.
    """

    def __init__(
        self, model: LoadedModel, task: Task, name: str, seed: int, steps: int | None = None
    ) -> None:
        check_choice("baseline", name, BaselineName)
        if steps is not None and name != "optimal":
            raise LensError(f"steps belong to baseline='optimal', got the baseline {name!r}")
        self._model = model
        self.rows = torch.arange(task.n)  # the prompts that are scored
        self._constants: optimal.Constants | None = None
        self._fitted: dict[tuple[tuple[HeadId, ...], ...], list[Source]] = {}
        self._latest: tuple[tuple[int, ...], Source] | None = None
        self.intervention = Intervention(name, seed if name == "resample" else None)
        self._others: Task | None = None  # whose outputs are put in
        self._means: dict[int, Tensor] = {}
        if name == "counterfactual":
            self._others = replace(task, clean=task.corrupt_or_refuse())
        elif name == "resample":
            task.refuse_lengths("baseline='resample'")
            self._others = task.take(other_rows(task.n, seed))
        elif name in ("mean", "pooled_mean"):
            if name == "mean" and task.n < 2:
                raise LensError(
                    "the mean over one prompt is that prompt, so nothing would change; take more "
                    "prompts, or baseline='pooled_mean', the mean over positions too"
                )
            self._means = task_means(model, task, keep_positions=name == "mean")
        elif name == "optimal":
            steps = optimal.STEPS if steps is None else steps
            check_counts(steps=steps)
            optimal.check_metric(task)
            fitted_on, self.rows = optimal.split(task.n, seed)
            self._constants = optimal.Constants(model, task, fitted_on, steps, seed)
            self.intervention = Intervention(name, seed, tuple(fitted_on.tolist()), steps)

    @property
    def donors(self) -> Tensor | None:
        """[prompts, tokens], whose outputs are put in; None: no prompts' are."""
        return None if self._others is None else self._others.clean

    def groups_at_once(self, rows_at_once: int) -> int:
        """How many groups run in one forward pass of at most `rows_at_once` rows."""
        if self._constants is not None:
            return self._constants.groups_at_once()
        return max(1, rows_at_once // min(rows_at_once, len(self.rows)))

    def sources(self, groups: Sequence[Sequence[HeadId]], rows: Tensor) -> list[Source]:
        """What stands in for each group of heads on the prompts `rows`."""
        if self._constants is not None:
            key = tuple(map(tuple, groups))
            if key not in self._fitted:
                self._fitted[key] = self._constants.fit(groups)
            return self._fitted[key]
        key = tuple(rows.tolist())
        if self._latest is None or self._latest[0] != key:
            self._latest = (key, self.source(rows))
        return [self._latest[1]] * len(groups)

    def source(self, rows: Tensor) -> Source:
        """What stands in for all heads on the prompts `rows`; an optimal constant has its own for each."""
        if self._others is not None:
            outputs: dict[int, Tensor] = {}
            given = self._others.given(self._model, rows)
            read_heads(self._model, given, outputs.__setitem__)
            return lambda layer, _: outputs[layer]
        if self._means:
            return lambda layer, _: self._means[layer]
        return lambda _, output: torch.zeros_like(output)


def task_means(model: LoadedModel, task: Task, *, keep_positions: bool) -> dict[int, Tensor]:
    """See `mean_outputs`: over the clean prompts of a task, without what fills them up."""
    chunks = task.chunks(task.rows_at_once(model))
    parts = (
        (task.given(model, rows), None if task.lengths is None else task.own[rows])
        for rows in chunks
    )
    return mean_outputs(model, parts, keep_positions=keep_positions)


def other_rows(n: int, seed: int) -> Tensor:
    """For each prompt the number of another one; every prompt is drawn once.

    Raises:
        LensError: there is no other prompt.
    """
    check_counts(0, seed=seed)
    if n < 2:
        raise LensError("resample needs at least two prompts to take another's output; got 1")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(order)
    others[order] = order.roll(1)  # one cycle through all: nobody draws itself
    return others
