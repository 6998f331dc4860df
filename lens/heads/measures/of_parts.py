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
from lens.heads.measures.scores import HeadScores, Intervention
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt
from lens.passes.sessions import listening
from lens.passes.sources import read_sources

_BASELINES = ("pooled_mean", "zero")


def importance_of_part(
    model: LoadedModel, prompts: Any, baseline: str | None, progress: bool
) -> HeadScores:
    """`lens.heads.importance` of `model.part(...)` on prompts: the mean loss of the tokens of their targets, in nats.

    Args:
        model: one part of an encoder-decoder.
        prompts: as for `lens.capture`; a source alone is given the target that the model writes.
        baseline: "pooled_mean", over prompts and positions (if None), or "zero".
        progress: show a bar.

    Raises:
        LensError: no part is chosen, prompts without a target of two tokens, or a model without logits.
    """
    model.check_part()
    name = check_choice("baseline", baseline or "pooled_mean", _BASELINES)
    read = read_sources(model, prompts)[0]
    for prompt in read:
        if prompt.target is None or len(prompt.target) < 2:
            raise LensError(
                "importance of a part needs targets of at least two tokens: it is measured on their loss"
            )
    instead = _means(model, read) if name == "pooled_mean" else {}
    heads = model.info.every_head
    per_prompt = np.full((model.info.layers, model.info.heads, len(read)), np.nan)
    clean = np.array([_loss(model, prompt, None, instead) for prompt in read])
    with advancing(f"{model.name}: heads", len(heads) * len(read), progress) as advance:
        for head in heads:
            for number, prompt in enumerate(read):
                found = _loss(model, prompt, head, instead)
                per_prompt[head.layer, head.head, number] = found - clean[number]
                advance(1)
    return HeadScores(
        per_prompt=per_prompt,
        clean=clean,
        method="ablation",
        intervention=Intervention(name),
        metric="loss",
        sign=-1,
        task=f"target ({model.chosen})",
        model=model.name,
    )


def _means(model: LoadedModel, prompts: Sequence[Prompt]) -> dict[int, Tensor]:
    """Per layer [heads, value_dim], over prompts and positions."""
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def on_layer(call: LayerCall) -> Tensor:
        z = attend(call).output
        total = z[0].double().sum(1).cpu()
        sums[call.layer] = sums[call.layer] + total if call.layer in sums else total
        counts[call.layer] = counts.get(call.layer, 0) + z.shape[2]
        return z

    with torch.no_grad(), listening(model, on_layer):
        for prompt in prompts:
            model.model(**prompt.inputs)
    return {layer: total / counts[layer] for layer, total in sums.items()}


def _loss(
    model: LoadedModel, prompt: Prompt, head: HeadId | None, instead: dict[int, Tensor]
) -> float:
    """Mean loss of the target's tokens from the second on, with one head taken out or none."""

    def on_layer(call: LayerCall) -> Tensor:
        z = attend(call).output
        if head is None or call.layer != head.layer:
            return z
        z = z.clone()
        z[:, head.head] = instead[call.layer][head.head].to(z) if instead else 0
        return z

    with torch.no_grad(), listening(model, on_layer, exclusive=True):
        found: Any = model.model(**prompt.inputs)
    logits = getattr(found, "logits", None)
    target = torch.tensor(prompt.target, device=model.device)
    if not isinstance(logits, Tensor) or logits.shape[:2] != (1, len(target)):
        raise LensError(
            f"{model.info.class_name} gives no logits of its target; load the model with its head"
        )
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), target[1:]))
