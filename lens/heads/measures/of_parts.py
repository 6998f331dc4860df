"""Importance of the heads of one part of an encoder-decoder: the loss of the target with each of them taken out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.heads.measures.baselines import other_rows
from lens.heads.measures.scores import HeadScores, Intervention
from lens.models.loaded import LoadedModel
from lens.passes.head_outputs import FEWEST, Source, edited_logits, mean_heads, read_heads
from lens.passes.inputs import Prompt
from lens.passes.sources import read_sources

_BASELINES = ("pooled_mean", "mean", "zero", "resample")
_LOGITS = 1 << 25  # numbers that one forward pass may return


def importance_of_part(
    model: LoadedModel, prompts: Any, baseline: str | None, seed: int, progress: bool
) -> HeadScores:
    """`lens.heads.importance` of `model.part(...)` on prompts: the mean loss of the tokens of their targets, in nats.

    Args:
        model: one part of an encoder-decoder.
        prompts: as for `lens.capture`; a source alone is given the target that the model writes.
        baseline: "pooled_mean", over prompts and positions (if None); "mean" at each position; "zero"; "resample", the
            output on another prompt at the same positions, drawn by `seed`.
        seed, progress: as of `importance`.

    Raises:
        LensError: no part is chosen, prompts without a target of two tokens, a model without logits, or prompts whose
            positions the baseline does not reach.
    """
    name = check_choice("baseline", baseline or "pooled_mean", _BASELINES)
    read = read_sources(model, prompts)[0]
    for prompt in read:
        if prompt.target is None or len(prompt.target) < 2:
            raise LensError(
                "importance of a part needs targets of at least two tokens: it is measured on their loss"
            )
    instead = _sources(model, read, name, seed)
    heads = model.info.every_head
    per_prompt = np.full((model.info.layers, model.info.heads, len(read)), np.nan)
    clean = np.empty(len(read))
    with advancing(f"{model.name}: heads", len(heads) * len(read), progress) as advance:
        for number, (prompt, source) in enumerate(zip(read, instead, strict=True)):
            clean[number] = _losses(model, prompt, [[]], source)[0]
            size = len(prompt.target or ()) * max(model.info.vocab or 1, 1024)
            stack = max(1, _LOGITS // size)
            for start in range(0, len(heads), stack):
                some = heads[start : start + stack]
                found = _losses(model, prompt, [[head] for head in some], source) - clean[number]
                for head, more in zip(some, found, strict=True):
                    per_prompt[head.layer, head.head, number] = more
                advance(len(some))
    return HeadScores(
        per_prompt=per_prompt,
        clean=clean,
        method="ablation",
        intervention=Intervention(name, seed if name == "resample" else None),
        metric="loss",
        sign=-1,
        task=f"target ({model.chosen})",
        model=model.name,
    )


def _sources(model: LoadedModel, prompts: Sequence[Prompt], name: str, seed: int) -> list[Source]:
    """What stands in for heads on each prompt."""
    if name == "zero":
        return [lambda _, z: torch.zeros_like(z)] * len(prompts)
    if name == "resample":
        others = other_rows(len(prompts), seed).tolist()
        return [_drawn(model, prompts[number]) for number in others]
    means = mean_heads(model, [dict(one.inputs) for one in prompts], name == "mean")

    def mean(layer: int, z: Tensor) -> Tensor:
        found = means[layer]
        if found.shape[1] > 1 and z.shape[2] > found.shape[1]:
            raise LensError(
                f"position {z.shape[2] - 1} has no mean: fewer than {FEWEST} of the prompts reach it; use "
                "baseline='pooled_mean'"
            )
        return found[None, :, : z.shape[2]]

    return [mean] * len(prompts)


def _drawn(model: LoadedModel, other: Prompt) -> Source:
    """The output on another prompt."""
    outputs: dict[int, Tensor] = {}

    def source(layer: int, z: Tensor) -> Tensor:
        if outputs[layer].shape[2] != z.shape[2]:
            raise LensError(
                f"baseline='resample' puts in what a head gives on another prompt at the same position, and these have "
                f"{z.shape[2]} and {outputs[layer].shape[2]}; give prompts of one length, or take 'pooled_mean'"
            )
        return outputs[layer]

    read_heads(model, other.inputs, outputs.__setitem__)
    return source


def _losses(
    model: LoadedModel, prompt: Prompt, groups: list[list[HeadId]], source: Source
) -> np.ndarray:
    """[groups], mean loss of the target's tokens from the second on with each group of heads taken out."""
    logits = edited_logits(model, prompt.inputs, groups, [source] * len(groups))[:, 0]
    target = torch.tensor(prompt.target, device=logits.device)
    if logits.shape[1] != len(target):
        raise LensError(
            f"{model.info.class_name} gives no logits of its target; load the model with its head"
        )
    guessed = logits[:, :-1].float().log_softmax(-1)
    return (
        -guessed.gather(2, target[1:].expand(len(groups), -1)[..., None]).mean((1, 2)).cpu().numpy()
    )
