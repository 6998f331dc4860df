"""Attribution patching with the exact attention fixes (AtP*): what a head's query, key and value are worth.

Plain attribution multiplies a change by a slope, and the slope by a query or key is 0 where the softmax
is saturated, however much would change. Here the softmax is recomputed for every patched query and key
(`lens_kernels.patch_effects`, no N×N), and only what comes after the head is linear:

    query i   sum_t (p'_it - p_it) dO_i . v_t
    key t     sum_i (p'_it - p_it) / (1 - p_it) * (dO_i . v_t - dO_i . o_i)
    value t   sum_i p_it dO_i . (v'_t - v_t), which is linear

each position alone. GradDrop repeats this with the gradient through one layer after another blocked,
which brings back effects of opposite sign that cancel (direct against through a layer). A head whose
work is hidden by the saturated softmax of a *later* head still scores 0: that head's own query or key
shows it (Kramár et al., AtP*, 2024, arXiv 2403.00745).
"""

from collections.abc import Callable

import numpy as np
import torch
from lens_kernels import patch_effects
from torch import Tensor

from lens.common.errors import LensError
from lens.heads.measures.methods import READS, AtP
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, kernel_options
from lens.passes.head_outputs import HeadGradient, read_calls, with_gradients
from lens.passes.sublayers import sublayers
from lens.tasks.task import Task


def atp_star(
    model: LoadedModel,
    task: Task,
    donors: Tensor,
    method: AtP,
    rows: Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Metric [rows], and the sum over positions of what patching costs [layers, heads, rows].

    Args:
        model, task: as in `importance`.
        donors: [prompts, tokens], the prompts whose queries, keys and values are put in.
        method: what is patched and how it is added up; GradDrop averages the absolute effects over
            passes with one layer's gradient blocked, `1 / (layers - 1)` times their sum.
        rows: numbers of the prompts.

    Raises:
        LensError: GradDrop of a model with one layer, or one whose sub-layers are not known.
    """
    clean, benefit = differentiable_benefit(task, rows)
    instead = read_calls(model, donors[rows])
    reads = method.reads
    if not method.grad_drop:
        gradients = with_gradients(model, task.clean[rows], benefit)
        found = [
            _scores(*both, reads, method.absolute) for both in zip(gradients, instead, strict=True)
        ]
        return clean[0], torch.stack(found).double().cpu().numpy()
    layers = model.info.layers
    if layers < 2:
        raise LensError("GradDrop blocks one layer at a time and needs another; this model has one")
    total = 0
    for parts in sublayers(model):
        blocked = [part for part in parts if part is not None]
        gradients = with_gradients(model, task.clean[rows], benefit, blocked=blocked)
        found = [_scores(*both, reads, "token") for both in zip(gradients, instead, strict=True)]
        total = total + torch.stack(found).double().cpu().numpy() / (layers - 1)
    return clean[0], np.asarray(total)


def _scores(gradient: HeadGradient, instead: LayerCall, reads: str, absolute: str | None) -> Tensor:
    """[heads, rows]: benefit lost by patching, summed over the positions."""
    call = gradient.call
    effects = patch_effects(
        call.query,
        call.key,
        call.value,
        gradient.slope,
        patched_query=instead.query if "q" in reads else None,
        patched_key=instead.key if "k" in reads else None,
        patched_value=instead.value if "v" in reads else None,
        **kernel_options(call),
    )
    found = [getattr(effects, READS[letter]) for letter in reads]  # [rows, heads, positions]
    if absolute == "token":
        return torch.stack([part.abs().sum(-1) for part in found]).sum(0).T
    lost = -torch.stack([part.sum(-1) for part in found]).sum(0).T
    return lost.abs() if absolute == "prompt" else lost


def differentiable_benefit(
    task: Task, rows: Tensor
) -> tuple[list[np.ndarray], Callable[[Tensor], Tensor]]:
    """A list that will hold the metric [rows], and the function of the logits that puts it there."""
    clean: list[np.ndarray] = []

    def benefit(logits: Tensor) -> Tensor:
        values = task.measure(logits, rows)
        clean.append(values.detach().double().cpu().numpy())
        return task.sign * values

    return clean, benefit
