"""Importance of heads for a task: ablated for real, or estimated from one backward pass.

A gradient sees what an infinitely small change would do. Where the model is saturated (a logic gate, a
softmax near one key) or heads stand in for each other, that is not what an ablation does, so the two
are worth comparing: `lens.heads.agreement`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.heads.measures.atp import atp_star, differentiable_benefit
from lens.heads.measures.baselines import Baseline
from lens.heads.measures.checkpoint import Checkpoint, configuration
from lens.heads.measures.direct import direct_effects
from lens.heads.measures.methods import BASELINES, AtP, Gradient, Method, named
from lens.heads.measures.methods import Baseline as BaselineName
from lens.heads.measures.of_parts import importance_of_part
from lens.heads.measures.scores import HeadScores
from lens.models.loaded import LoadedModel
from lens.passes.head_outputs import HeadGradient, edited_logits, with_gradients
from lens.tasks.task import Task

_WHY = {
    "attribution": "is a slope, and an optimal constant is fitted to the real ablation",
    "atp": "patches queries and keys of another prompt",
    **dict.fromkeys(("gradient", "gate", "direct"), "compares with zero alone"),
}
"""Why a method does not know every baseline."""
_DIRECT = "direct path from the head to the logits, last norm's size frozen"


def importance(
    model: LoadedModel,
    task: Task | Any,
    *,
    method: Method | Gradient | AtP = "ablation",
    baseline: BaselineName | None = None,
    steps: int | None = None,
    seed: Seed = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """What each head is worth to a task; positive = ablating it makes the task worse.

    With m the metric turned so that more is better, z the output of a head (before the output
    projection) and b what is put in its place, the score of a prompt is

        ablation      m(z) - m(b), one forward pass per head, many heads stacked in each
        attribution   sum of dm/dz * (z - b), its first-order estimate (attribution patching)
        gradient      sum of dm/dz * z, the estimate for zero: `dO . O` of the attention kernel's
                      backward pass, so it runs at the length that the model runs at
        atp           the query, key and value of the head patched, each position alone, the softmax
                      recomputed (`lens.heads.measures.atp`); not the sum of dm/dz over z: where a softmax is
                      saturated the slope by a query or key is 0 and this is not
        gate          the gradient minus its mean over the heads of the layer: dm/dr of a
                      mixture-of-head router with the gates `heads * softmax(r)` at r = 0, which is
                      the dense model (Jin et al., MoH, 2024, arXiv 2410.11842)
        direct        z W_O (W_U[correct] - W_U[wrong]) / size of the last norm: what the head writes
                      straight into the logit difference (direct logit attribution)

    Args:
        model: as `lens.load` returns it.
        task: prompts and metric; "accuracy" has no gradient. Of `model.part("cross")` and the other parts of an
            encoder-decoder a task with targets (methods "ablation", "attribution", "gradient", "gate"), or prompts,
            sources with their targets of any lengths: the loss of the target is measured, each head in turn put to
            its "pooled_mean" (if None), "zero", "mean" or "resample".
        method: "ablation", "attribution", "atp", "gradient", "gate" or "direct"; `lens.heads.AtP` and
            `lens.heads.Gradient` are "atp" and "gradient" with arguments of their own.
        baseline: "zero", "mean", "pooled_mean", "resample", "counterfactual" or, for ablation alone,
            "optimal" (`Intervention`, `lens.heads.measures.optimal`); None: "mean" for ablation,
            "counterfactual" for attribution, "zero" for the others, which know no other.
        steps: of the fit of "optimal"; None: 25.
        seed: of the draw of "resample", and of the halves and batches of "optimal".
        checkpoint: a file (.npz) for numbers as they come; the same call goes on from it with the
            same result. A file of another computation is refused.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Reference: Michel, Levy, Neubig, Are Sixteen Heads Really Better than One?, 2019, arXiv 1905.10650;
        Syed, Rager, Conmy, Attribution Patching Outperforms Automated Circuit Discovery, 2023,
        arXiv 2310.10348.

    Raises:
        LensError: an unknown `method` or `baseline`, ones that do not go together, a metric
            without a gradient, or prompts that the model does not take.

    Example:
        >>> str(lens.heads.importance(small, lens.tasks.induction(small, n=8)).top(1)[0])
        'L0H1'
    """
    if isinstance(model, LoadedModel) and model.parts:
        model.check_part()
        if not isinstance(task, Task) and model.is_encoder_decoder:
            if method != "ablation":
                raise LensError(
                    "on prompts of an encoder-decoder importance is measured by method='ablation'; other methods take a "
                    "task: lens.tasks.language_modelling(model, pairs)"
                )
            return importance_of_part(model, task, baseline, seed, progress)
        if named(method)[0] in ("atp", "direct"):
            raise LensError(
                f"method={named(method)[0]!r} follows one residual stream, and {model.info.class_name} has several; take "
                "'ablation', 'attribution', 'gradient' or 'gate'"
            )
    given_as("Task", task=task)
    word, arguments = named(method)
    name = baseline or BASELINES[word][0]
    if name not in BASELINES[word]:
        others = [other for other in BASELINES if name in BASELINES[other]]
        raise LensError(
            f"method={word!r} {_WHY[word]}, got the baseline {name!r}; take {' or '.join(BASELINES[word])}, "
            f"or for this baseline method={' or '.join(map(repr, others))}"
        )
    if task.is_flat and word not in ("ablation", "direct"):
        raise LensError(
            f"the metric {task.metric!r} is at its best where the model is as it is, so that its gradient "
            f"there is 0 and method={word!r} says nothing about the heads; use method='ablation'"
        )
    task.check(model)
    depends = asdict(arguments) | {"method": word, "baseline": name, "steps": steps, "seed": seed}
    kept = Checkpoint(checkpoint, configuration(model, task, **depends) if checkpoint else {})
    replacement = Baseline(model, task, name, seed, steps)
    if word == "ablation":
        groups = [[head] for head in model.info.every_head]
        clean, drops = drops_of(model, task, groups, replacement, progress, kept)
    else:
        if word == "direct":
            compute = partial(direct_effects, model, task)
        elif isinstance(arguments, AtP):
            assert replacement.donors is not None
            compute = partial(atp_star, model, task, replacement.donors, arguments)
        else:
            compute = partial(_estimates, model, task, replacement, word, arguments.absolute)
        clean, drops = _by_rows(model, task, compute, word, progress, kept)
    intervention = replacement.intervention
    if word == "direct":
        intervention = replace(intervention, granularity=_DIRECT)
    if isinstance(arguments, AtP):
        patched, dropped = arguments.granularity, arguments.grad_drop
        intervention = replace(intervention, granularity=patched, grad_drop=dropped)
    return HeadScores(
        per_prompt=model.info.by_layer(
            drops.reshape(len(model.info.attending), model.info.heads, -1)
        ),
        clean=clean,
        method=word,
        intervention=intervention,
        metric=task.metric,
        sign=task.sign,
        task=task.name,
        model=model.name,
        absolute=arguments.absolute,
    )


def drops_of(
    model: LoadedModel,
    task: Task,
    groups: list[list[HeadId]],
    replacement: Baseline,
    progress: bool,
    checkpoint: Checkpoint,
) -> tuple[np.ndarray, np.ndarray]:
    """Metric [prompts] of the model as it is, and loss of benefit [groups, prompts] by each group."""
    capacity = task.rows_at_once(model)
    stack = replacement.groups_at_once(capacity)
    scored = replacement.rows
    clean = np.empty(len(scored))
    ablated = np.empty((len(groups), len(scored)))
    zero = Baseline(model, task, "zero", 0)
    with _advancing(model, "ablations", len(groups) * len(scored), progress, checkpoint) as advance:
        for at in torch.arange(len(scored)).split(max(1, capacity // stack)):
            rows, where = scored[at], at.numpy()

            def measured(
                chosen: list[list[HeadId]], by: Baseline = replacement, rows: Tensor = rows
            ) -> np.ndarray:
                sources = by.sources(chosen, rows)
                given = task.given(model, rows)
                logits = edited_logits(model, given, chosen, sources)
                found = [task.measure(one, rows).double().cpu().numpy() for one in logits]
                return np.stack(found)

            name = f"prompts from {int(at[0])}"
            clean[where] = checkpoint.remember(name, lambda of=measured: of([[]], zero)[0])
            for start in range(0, len(groups), stack):
                some = groups[start : start + stack]
                ablated[start : start + stack, where] = checkpoint.remember(
                    f"{name}, groups from {start}", lambda of=measured, some=some: of(some)
                )
                advance(len(some) * len(rows))
    return clean, task.sign * (clean - ablated)


def _by_rows(
    model: LoadedModel,
    task: Task,
    compute: Callable[[Tensor], tuple[np.ndarray, np.ndarray]],
    title: str,
    progress: bool,
    checkpoint: Checkpoint,
) -> tuple[np.ndarray, np.ndarray]:
    """Metric [prompts] and scores [layers, heads, prompts], some prompts at a time."""
    clean, scores = [], []
    with _advancing(model, title, task.n, progress, checkpoint) as advance:
        for rows in task.chunks(task.rows_at_once(model)):
            found: list[tuple[np.ndarray, np.ndarray]] = []

            def both(
                rows: Tensor = rows, found: list[tuple[np.ndarray, np.ndarray]] = found
            ) -> tuple[np.ndarray, np.ndarray]:
                if not found:
                    found.append(compute(rows))
                return found[0]

            name = f"prompts from {int(rows[0])}"
            clean.append(checkpoint.remember(name, lambda both=both: both()[0]))
            scores.append(checkpoint.remember(f"{name}, heads", lambda both=both: both()[1]))
            advance(len(rows))
    return np.concatenate(clean), np.concatenate(scores, axis=-1)


@contextmanager
def _advancing(
    model: LoadedModel, what: str, total: int, progress: bool, checkpoint: Checkpoint
) -> Iterator[Callable[[int], None]]:
    """A progress bar; at its end, by an exception perhaps, the checkpoint is written."""
    try:
        with advancing(f"{model.name}: {what}", total, progress) as advance:
            yield advance
    finally:
        checkpoint.write()


def _estimates(
    model: LoadedModel,
    task: Task,
    replacement: Baseline,
    method: str,
    absolute: str | None,
    rows: Tensor,
) -> tuple[np.ndarray, np.ndarray]:
    """Metric [rows], and first-order estimates [layers, heads, rows]."""
    clean, benefit = differentiable_benefit(task, rows)
    gradients = with_gradients(model, task.given(model, rows), benefit)
    source = replacement.source(rows) if method == "attribution" else None
    found = []
    for layer, gradient in zip(model.info.attending, gradients, strict=True):
        if source is None:
            scores = _michel(gradient, absolute)
        else:
            change = gradient.output - source(layer, gradient.output)
            scores = (gradient.slope * change).double().sum((2, 3))  # [rows, heads]
        found.append(scores.T.cpu().numpy())
    found = np.stack(found)
    if method == "gate":
        found = found - found.mean(1, keepdims=True)
    return clean[0], found


def _michel(gradient: HeadGradient, absolute: str | None) -> Tensor:
    """[rows, heads] sum of dO . O over the tokens."""
    per_token = gradient.attribution.double()
    if absolute == "token":
        per_token = per_token.abs()
    total = per_token.sum(2)
    return total.abs() if absolute == "prompt" else total
