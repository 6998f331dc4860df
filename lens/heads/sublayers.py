"""Sub-layers left out one at a time, greedily one after another, and what a layer does to the stream."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import check_choice, is_number, is_whole
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.progress import advancing
from lens.edits.parts import Ablate
from lens.edits.running import edit
from lens.heads.pruning import distances
from lens.heads.pruning.distances import Distance
from lens.heads.pruning.sublayer_scores import BlockInfluence, GreedyRemoval, SkipSweep
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel
from lens.passes.calls import first_of
from lens.passes.logits import logits_of
from lens.passes.sublayers import named_sublayers
from lens.tasks.task import Task


def importance(
    model: LoadedModel, task: Task, *, distance: Distance = "js", progress: bool = True
) -> SkipSweep:
    """Leave out each attention and MLP sub-layer alone: what the task loses, and how far the outputs move.

    A sub-layer that is left out adds 0 to the residual stream. Two numbers per sub-layer, since one
    may change the outputs without making them worse (the skip sweep of RelaCtrl, 2025, arXiv
    2502.14377).

    Args:
        model: as `lens.load` returns it.
        task: prompts and metric.
        distance: of the outputs: "norm", "angular", "kl", "js" or "js_finercut".
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown distance, sub-layers that are not found, or prompts that do not fit.
    """
    given_as("Task", task=task)
    names, clean, without = _prepared(model, task, distance)
    drops, moved = [], []
    with advancing(f"{model.name}: sub-layers", len(names), progress) as advance:
        for name in names:
            apart, metric = without([name])
            drops.append(task.sign * (clean - metric))
            moved.append(apart)
            advance(1)
    return SkipSweep(
        tuple(names), np.stack(drops), np.stack(moved), clean, distance, task.metric, task.name, model.name
    )  # fmt: skip


def greedy_removal(
    model: LoadedModel,
    task: Task,
    *,
    count: int | None = None,
    distance: Distance = "js",
    spared: float = 0.0,
    progress: bool = True,
) -> GreedyRemoval:
    """Take out sub-layers one after another, at each step the one without which the outputs move least.

    Outputs are compared with those of the whole model, over all positions; `count` steps cost about
    `count * sub-layers` forward passes.

    Args:
        model, task, distance, progress: as in `importance`.
        count: how many to take out; None: half of them.
        spared: the first `int(spared * sub-layers) + 1` stay for as long as others are left to take
            out (FinerCut's option `-x`); 0: none is spared.

    Reference: Zhang et al., FinerCut, 2024, arXiv 2405.18218.

    Raises:
        LensError: a count that the model has not, a share outside [0, 1), and as in `importance`.

    Example:
        >>> len(lens.heads.sublayers.greedy_removal(model, task.take(torch.arange(2)), count=2).order)
        2
    """
    given_as("Task", task=task)
    candidates, clean, without = _prepared(model, task, distance)
    total = len(candidates)
    count = total // 2 if count is None else count
    if not (is_whole(count) and 1 <= count <= total):
        raise LensError(f"count must be 1 to {total}, the sub-layers of {model.name}; got {count}")
    if not (is_number(spared) and 0 <= spared < 1):
        raise LensError(f"spared must be a share in [0, 1), got {spared}; use e.g. 0.4")
    last = candidates[: int(spared * total) + 1] if spared else []
    order: list[str] = []
    found, losses = [], [clean]
    late = min(len(last), total)
    steps = sum(total - step - late * (step < total - late) for step in range(count))
    with advancing(f"{model.name}: removals", steps, progress) as advance:
        for _ in range(count):
            best: tuple[float, str, np.ndarray, np.ndarray] | None = None
            left = [name for name in candidates if name not in order]
            for name in [name for name in left if name not in last] or left:
                apart, metric = without([*order, name])
                if best is None or apart.mean() < best[0]:
                    best = (float(apart.mean()), name, apart, metric)
                advance(1)
            assert best is not None
            order.append(best[1])
            found.append(best[2])
            losses.append(best[3])
    return GreedyRemoval(
        tuple(order), np.stack(found), np.stack(losses), total, distance, task.metric, task.name, model.name
    )  # fmt: skip


def block_influence(model: LoadedModel, task: Task, *, progress: bool = True) -> BlockInfluence:
    """How much each layer turns the residual stream: `1 - E cos(x before, x after)`.

    One forward pass, blind to what the turn is good for: the cheap stand-in for leaving layers out.

    Args:
        model, task, progress: as in `importance`.

    Reference: Men et al., ShortGPT, 2024, arXiv 2403.03853.

    Raises:
        LensError: layers that are not found, or prompts that do not fit.

    Example:
        >>> lens.heads.sublayers.block_influence(model, task).table()["layer"].tolist()
        [0, 1, 2]
    """
    given_as("Task", task=task)
    layers = dict.fromkeys(blocks(model))
    task.check(model)
    task.refuse_lengths("block_influence")
    parts, turned = [], []

    def keep(_: object, inputs: tuple[Tensor, ...], output: object) -> None:
        after = first_of(output)
        cosine = torch.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
        turned.append(1 - cosine.mean(1))  # [rows]

    with ExitStack() as stack, torch.no_grad():
        advance = stack.enter_context(advancing(f"{model.name}: layers", task.n, progress))
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        for rows in task.chunks(task.rows_at_once(model)):
            logits_of(model, task.clean[rows])
            parts.append(torch.stack(turned))
            turned.clear()
            advance(len(rows))
    return BlockInfluence(torch.cat(parts, 1).cpu().numpy(), task.name, model.name)


_Without = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def _prepared(
    model: LoadedModel, task: Task, distance: Distance
) -> tuple[list[str], np.ndarray, _Without]:
    """Names of the sub-layers, the metric [prompts], and what leaving some out does: distance and metric."""
    check_choice("distance", distance, Distance)
    candidates = named_sublayers(model)
    task.check(model)
    task.refuse_lengths("importance of sub-layers")
    whole = _logits(model, task, [])

    def without(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        cut = _logits(model, task, names)
        both = zip(whole, cut, strict=True)
        found = torch.cat([distances.distance(distance, *chunks) for chunks in both])
        return found.cpu().numpy(), _metric(task, cut)

    return list(candidates), _metric(task, whole), without


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
