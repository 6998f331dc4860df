"""Importance of heads for a task: ablated for real, or estimated from one backward pass.

A gradient sees what an infinitely small change would do. Where the model is saturated (a logic gate, a
softmax near one key) or heads stand in for each other, that is not what an ablation does, so the two
are worth comparing: `lens.heads.agreement`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from lens.errors import LensError
from lens.head_ids import AnyHead, HeadId, head_id
from lens.heads.baselines import Baseline
from lens.heads.direct import direct_effects
from lens.heads.editing import HeadGradient, edited_logits, with_gradients
from lens.heads.group import GroupAblation
from lens.heads.progress import advancing
from lens.heads.scores import BY, HeadScores
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

_DEFAULT_BASELINE = {
    "ablation": "mean",
    "gradient": "zero",
    "attribution": "counterfactual",
    "direct": "zero",
}
_DIRECT = "direct path from the head to the logits, last norm's size frozen"
_ABSOLUTE = (None, "prompt", "token")


def importance(
    model: LoadedModel,
    task: Task,
    *,
    by: str = "ablation",
    baseline: str | None = None,
    absolute: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """What each head is worth to a task; positive = ablating it makes the task worse.

    With m the metric turned so that more is better, z the output of a head (before the output
    projection) and b what is put in its place, the score of a prompt is

        ablation      m(z) - m(b), one forward pass per head, many heads stacked in each
        attribution   sum of dm/dz * (z - b), its first-order estimate (attribution patching)
        gradient      sum of dm/dz * z, the estimate for zero: `dO . O` of the attention kernel's
                      backward pass, so it runs at the length that the model runs at
        direct        z W_O (W_U[correct] - W_U[wrong]) / size of the last norm: what the head writes
                      straight into the logit difference (direct logit attribution)

    Args:
        model: as `lens.load` returns it.
        task: prompts and metric; "accuracy" has no gradient.
        by: "ablation", "attribution", "gradient" or "direct".
        baseline: "zero", "mean", "pooled_mean", "resample" or "counterfactual" (`Intervention`);
            None: "mean" for ablation, "counterfactual" for attribution, "zero" for gradient and
            direct, which know no other.
        absolute: of the gradient: "token" takes |dO . O| of each token before the sum, as Michel et
            al.'s code does, "prompt" that of the sum, as they write it. Both lose the sign.
        seed: of the draw of "resample".
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Reference: Michel, Levy, Neubig, Are Sixteen Heads Really Better than One?, 2019, arXiv 1905.10650;
        Syed, Rager, Conmy, Attribution Patching Outperforms Automated Circuit Discovery, 2023,
        arXiv 2310.10348.

    Raises:
        LensError: an unknown `by`, `baseline` or `absolute`, ones that do not go together, a metric
            without a gradient, or prompts that the model does not take.

    Example:
        >>> importance(model, lens.tasks.induction(model)).top(1)
        [HeadId(layer=0, head=1)]
    """
    if by not in BY:
        raise LensError(f"unknown by={by!r}; known: {', '.join(BY)}")
    if absolute not in _ABSOLUTE:
        raise LensError(f"absolute must be None, 'prompt' or 'token', got {absolute!r}")
    if absolute is not None and by != "gradient":
        raise LensError(f"absolute belongs to by='gradient', got by={by!r}")
    name = _DEFAULT_BASELINE[by] if baseline is None else baseline
    if by in ("gradient", "direct") and name != "zero":
        raise LensError(
            f"by={by!r} compares with zero alone, got the baseline {name!r}; "
            "use by='attribution' for it"
        )
    task.check(model)
    replacement = Baseline(model, task, name, seed)
    if by == "ablation":
        groups = [[head] for head in _all_heads(model)]
        clean, drops = _drops(model, task, groups, replacement, progress)
    elif by == "direct":
        clean, drops = _directly(model, task, progress)
    else:
        clean, drops = _estimates(model, task, replacement, by, absolute, progress)
    intervention = replacement.intervention
    if by == "direct":
        intervention = replace(intervention, granularity=_DIRECT)
    return HeadScores(
        per_prompt=drops.reshape(model.info.layers, model.info.heads, task.n),
        clean=clean,
        by=by,
        intervention=intervention,
        metric=task.metric,
        sign=task.sign,
        task=task.name,
        model=model.name,
        absolute=absolute,
    )


def ablate(
    model: LoadedModel,
    task: Task,
    *,
    heads: Sequence[AnyHead],
    baseline: str = "mean",
    seed: int = 0,
    progress: bool = True,
) -> GroupAblation:
    """Replace several heads at once.

    Heads that do the same work hide each other: each alone may be spared, all of them may not.
    `GroupAblation.interaction` compares with single heads.

    Args:
        model, task, baseline, seed, progress: as in `importance`.
        heads: `L1H0`, `"1.0"` or `(1, 0)` each.

    Raises:
        LensError: no heads, one named twice, one that the model has not, and as in `importance`.
    """
    group = [head_id(head, layers=model.info.layers, heads=model.info.heads) for head in heads]
    if not group:
        raise LensError("no heads were given; name at least one, such as 'L1H0'")
    if twice := sorted({str(head) for head in group if group.count(head) > 1}):
        raise LensError(f"{', '.join(twice)} is named twice; name each head once")
    task.check(model)
    replacement = Baseline(model, task, baseline, seed)
    clean, drops = _drops(model, task, [group], replacement, progress)
    return GroupAblation(
        heads=tuple(group),
        per_prompt=drops[0],
        clean=clean,
        intervention=replacement.intervention,
        metric=task.metric,
        sign=task.sign,
        task=task.name,
        model=model.name,
    )


def _all_heads(model: LoadedModel) -> list[HeadId]:
    info = model.info
    return [HeadId(layer, head) for layer in range(info.layers) for head in range(info.heads)]


def _drops(
    model: LoadedModel,
    task: Task,
    groups: list[list[HeadId]],
    replacement: Baseline,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Metric [prompts] of the model as it is, and loss of benefit [groups, prompts] by each group."""
    capacity = task.rows_at_once(model)
    clean = np.empty(task.n)
    ablated = np.empty((len(groups), task.n))
    with advancing(f"{model.name}: ablations", len(groups) * task.n, progress) as advance:
        for rows in task.chunks(capacity):
            ids, at = task.clean[rows], rows.numpy()
            source = replacement.source(rows)
            clean[at] = _measured(task, edited_logits(model, ids, [[]], source)[0], rows)
            stack = max(1, capacity // len(rows))
            for start in range(0, len(groups), stack):
                stacked = groups[start : start + stack]
                for offset, logits in enumerate(edited_logits(model, ids, stacked, source)):
                    ablated[start + offset, at] = _measured(task, logits, rows)
                advance(len(stacked) * len(rows))
    return clean, task.sign * (clean - ablated)


def _measured(task: Task, logits: Tensor, rows: Tensor) -> np.ndarray:
    return task.measure(logits, rows).double().cpu().numpy()


def _estimates(
    model: LoadedModel,
    task: Task,
    replacement: Baseline,
    by: str,
    absolute: str | None,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Metric [prompts], and first-order estimates [layers, heads, prompts]."""
    clean = np.empty(task.n)
    found = np.empty((model.info.layers, model.info.heads, task.n))
    with advancing(f"{model.name}: gradients", task.n, progress) as advance:
        for rows in task.chunks(task.rows_at_once(model)):
            at = rows.numpy()

            def benefit(logits: Tensor, rows: Tensor = rows, at: np.ndarray = at) -> Tensor:
                values = task.measure(logits, rows)
                clean[at] = values.detach().double().cpu().numpy()
                return task.sign * values

            gradients = with_gradients(model, task.clean[rows], benefit)
            source = replacement.source(rows) if by == "attribution" else None
            for layer, gradient in enumerate(gradients):
                if source is None:
                    scores = _michel(gradient, absolute)
                else:
                    change = gradient.output - source(layer, gradient.output)
                    scores = (gradient.slope * change).double().sum((2, 3))  # [rows, heads]
                found[layer][:, at] = scores.T.cpu().numpy()
            advance(len(rows))
    return clean, found


def _directly(model: LoadedModel, task: Task, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Metric [prompts], and direct effects [layers, heads, prompts]."""
    parts = []
    with advancing(f"{model.name}: direct effects", task.n, progress) as advance:
        for rows in task.chunks(task.rows_at_once(model)):
            parts.append(direct_effects(model, task, rows))
            advance(len(rows))
    clean, effects = zip(*parts, strict=True)
    return np.concatenate(clean), np.concatenate(effects, axis=-1)


def _michel(gradient: HeadGradient, absolute: str | None) -> Tensor:
    """[rows, heads] sum of dO . O over the tokens."""
    per_token = gradient.attribution.double()
    if absolute == "token":
        per_token = per_token.abs()
    total = per_token.sum(2)
    return total.abs() if absolute == "prompt" else total
