"""Sub-layers left out one at a time, greedily one after another, and what a layer does to the stream."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.edits.parts import Ablate
from lens.edits.running import edit
from lens.heads.pruning.distances import check_distance, distance
from lens.heads.pruning.sublayer_scores import BlockInfluence, GreedyRemoval, SkipSweep
from lens.models.layout import blocks, named_sublayers
from lens.models.loaded import LoadedModel
from lens.passes.logits import logits_of
from lens.tasks.task import Task


def importance(
    model: LoadedModel, task: Task, *, by: str = "js", progress: bool = True
) -> SkipSweep:
    """Leave out each attention and MLP sub-layer alone: what the task loses, and how far the outputs move.

    A sub-layer that is left out adds 0 to the residual stream. Two numbers per sub-layer, since one
    may change the outputs without making them worse (the skip sweep of RelaCtrl, 2025, arXiv
    2502.14377).

    Args:
        model: as `lens.load` returns it.
        task: prompts and metric.
        by: the distance of the outputs: "norm", "angular", "kl", "js" or "js_finercut".
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown distance, sub-layers that are not found, or prompts that do not fit.
    """
    candidates, whole = _prepared(model, task, by)
    names = list(candidates)
    drops, distances = [], []
    clean = _metric(task, whole)
    with advancing(f"{model.name}: sub-layers", len(names), progress) as advance:
        for name in names:
            cut = _logits(model, task, [name])
            drops.append(task.sign * (clean - _metric(task, cut)))
            distances.append(_distance(by, whole, cut))
            advance(1)
    return SkipSweep(
        names=tuple(names),
        drops=np.stack(drops),
        distances=np.stack(distances),
        clean=clean,
        distance=by,
        metric=task.metric,
        task=task.name,
        model=model.name,
    )


def greedy_removal(
    model: LoadedModel,
    task: Task,
    *,
    count: int | None = None,
    by: str = "js",
    spared: float = 0.0,
    progress: bool = True,
) -> GreedyRemoval:
    """Take out sub-layers one after another, at each step the one without which the outputs move least.

    Outputs are compared with those of the whole model, over all positions; `count` steps cost about
    `count * sub-layers` forward passes.

    Args:
        model, task, by, progress: as in `importance`.
        count: how many to take out; None: half of them.
        spared: the first `int(spared * sub-layers) + 1` stay for as long as others are left to take
            out (FinerCut's option `-x`); 0: none is spared.

    Reference: Zhang et al., FinerCut, 2024, arXiv 2405.18218.

    Raises:
        LensError: a count that the model has not, a share outside [0, 1), and as in `importance`.
    """
    candidates, whole = _prepared(model, task, by)
    total = len(candidates)
    count = total // 2 if count is None else count
    if not 1 <= count <= total:
        raise LensError(f"count must be 1 to {total}, the sub-layers of {model.name}; got {count}")
    if not 0 <= spared < 1:
        raise LensError(f"spared must be a share in [0, 1), got {spared}; use e.g. 0.4")
    last = list(candidates)[: int(spared * total) + 1] if spared else []
    order: list[str] = []
    found, losses = [], [_metric(task, whole)]
    late = min(len(last), total)
    steps = sum(total - step - late * (step < total - late) for step in range(count))
    with advancing(f"{model.name}: removals", steps, progress) as advance:
        for _ in range(count):
            best: tuple[float, str, np.ndarray, np.ndarray] | None = None
            left = [name for name in candidates if name not in order]
            for name in [name for name in left if name not in last] or left:
                cut = _logits(model, task, [*order, name])
                apart = _distance(by, whole, cut)
                if best is None or apart.mean() < best[0]:
                    best = (float(apart.mean()), name, apart, _metric(task, cut))
                advance(1)
            assert best is not None
            order.append(best[1])
            found.append(best[2])
            losses.append(best[3])
    return GreedyRemoval(
        order=tuple(order),
        distances=np.stack(found),
        losses=np.stack(losses),
        sublayers=total,
        distance=by,
        metric=task.metric,
        task=task.name,
        model=model.name,
    )


def block_influence(model: LoadedModel, task: Task) -> BlockInfluence:
    """How much each layer turns the residual stream: `1 - E cos(x before, x after)`.

    One forward pass, blind to what the turn is good for: the cheap stand-in for leaving layers out.

    Reference: Men et al., ShortGPT, 2024, arXiv 2403.03853.

    Raises:
        LensError: layers that are not found, or prompts that do not fit.
    """
    layers = blocks(model)
    task.check(model)
    parts = []
    for rows in task.chunks(task.rows_at_once(model)):
        turned: list[Tensor] = []

        def keep(_: object, inputs: tuple[Tensor, ...], output: object, to: list = turned) -> None:
            after = output[0] if isinstance(output, tuple) else output
            assert isinstance(after, Tensor)
            cosine = torch.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            to.append(1 - cosine.mean(1))  # [rows]

        handles = [layer.register_forward_hook(keep) for layer in dict.fromkeys(layers)]
        try:
            with torch.no_grad():
                logits_of(model, task.clean[rows])
        finally:
            for handle in handles:
                handle.remove()
        parts.append(torch.stack(turned))
    return BlockInfluence(torch.cat(parts, 1).cpu().numpy(), task.name, model.name)


def _prepared(
    model: LoadedModel, task: Task, by: str
) -> tuple[dict[str, torch.nn.Module], list[Tensor]]:
    """Sub-layers by name, and the logits of the whole model, some prompts at a time."""
    check_distance(by)
    candidates = named_sublayers(model)
    task.check(model)
    return candidates, _logits(model, task, [])


def _logits(model: LoadedModel, task: Task, gone: Sequence[str]) -> list[Tensor]:
    """[rows, tokens, vocab] of each chunk, with the sub-layers `gone` left out."""
    out = [Ablate(gone)] if gone else []
    with torch.no_grad(), edit(model, *out):
        return [
            logits_of(model, task.clean[rows]) for rows in task.chunks(task.rows_at_once(model))
        ]


def _metric(task: Task, logits: list[Tensor]) -> np.ndarray:
    """[prompts]"""
    rows = torch.arange(task.n).split([len(chunk) for chunk in logits])
    found = [task.measure(*both) for both in zip(logits, rows, strict=True)]
    return torch.cat(found).double().cpu().numpy()


def _distance(by: str, whole: list[Tensor], cut: list[Tensor]) -> np.ndarray:
    """[prompts]"""
    found = [distance(by, *both) for both in zip(whole, cut, strict=True)]
    return torch.cat(found).cpu().numpy()
