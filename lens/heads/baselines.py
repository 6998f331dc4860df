"""What is put in place of a head: zero, a mean, another prompt's output, the corrupt prompt's."""

import torch
from torch import Tensor

from lens.errors import LensError
from lens.heads.editing import Source, read_heads
from lens.heads.scores import BASELINES, Intervention
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task


class Baseline:
    """Replacement of head outputs for the prompts of one task.

    Means are taken once, over all prompts; what comes from single prompts is run when it is needed,
    so memory is that of the prompts in one forward pass.

    Args:
        model, task: what is ablated, and on what.
        name: one of `BASELINES`.
        seed: of the draw of "resample".

    Raises:
        LensError: an unknown name, no corrupt prompts, or nothing to draw from.
    """

    def __init__(self, model: LoadedModel, task: Task, name: str, seed: int) -> None:
        if name not in BASELINES:
            raise LensError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
        self._model = model
        self._donors: Tensor | None = None  # [prompts, tokens]
        self._means: list[Tensor] = []
        if name == "counterfactual":
            self._donors = task.corrupt_or_refuse()
        elif name == "resample":
            self._donors = task.clean[_other_rows(task.n, seed)]
        elif name in ("mean", "pooled_mean"):
            if name == "mean" and task.n < 2:
                raise LensError(
                    "the mean over one prompt is that prompt, so nothing would change; take more "
                    "prompts, or baseline='pooled_mean', the mean over positions too"
                )
            self._means = _means(model, task, keep_positions=name == "mean")
        self.intervention = Intervention(name, seed if name == "resample" else None)

    def source(self, rows: Tensor) -> Source:
        """What stands in for the heads on the prompts `rows`."""
        if self._donors is not None:
            outputs: list[Tensor] = []
            read_heads(self._model, self._donors[rows], lambda _, output: outputs.append(output))
            return lambda layer, _: outputs[layer]
        if self._means:
            return lambda layer, _: self._means[layer]
        return lambda _, output: torch.zeros_like(output)


def _means(model: LoadedModel, task: Task, *, keep_positions: bool) -> list[Tensor]:
    """Mean z per layer, [1, heads, queries | 1, value_dim], over the prompts (and positions)."""
    sums: dict[int, Tensor] = {}

    def add(layer: int, output: Tensor) -> None:
        total = output.double().sum(0, keepdim=True)
        if not keep_positions:
            total = total.mean(2, keepdim=True)
        sums[layer] = sums[layer] + total if layer in sums else total

    for rows in task.chunks(task.rows_at_once(model)):
        read_heads(model, task.clean[rows], add)
    return [sums[layer] / task.n for layer in sorted(sums)]


def _other_rows(n: int, seed: int) -> Tensor:
    """For each prompt the number of another one; every prompt is drawn once.

    Raises:
        LensError: there is no other prompt.
    """
    if n < 2:
        raise LensError("resample needs at least two prompts to take another's output; got 1")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(order)
    others[order] = order.roll(1)  # one cycle through all: nobody draws itself
    return others
