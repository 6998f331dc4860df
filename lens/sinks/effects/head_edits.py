"""Whole heads switched off, or made to look at the first token only, beside as many other heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits._keyed import KeyedEdit
from lens.edits.attention import Drop, Move
from lens.edits.base import selected_heads
from lens.edits.clean_runs import CleanRuns, clean_runs
from lens.edits.effect_results import Effect
from lens.edits.losses import log_probabilities, two_tokens
from lens.edits.recording import EffectRecorder
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts

_EDITS = {"off": Drop(lambda at: at.positions >= 0), "first": Move(None, to="first")}


def head_effect(
    model: LoadedModel,
    prompts: Any,
    *,
    heads: Sequence[AnyHead],
    to: str = "off",
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> Effect:
    """Set the outputs of heads to 0, or put all their attention on the first token (E6).

    The two interventions of Guo et al. (arXiv 2410.13835). Controls: "size", as many random other
    heads; "mass", the other heads whose attention to the first token is nearest to theirs. `keys`
    counts heads; `mass` is their attention to the first token.

    Args:
        model: a causal language model, as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        heads: such as "L1H0".
        to: "off" or "first".
        seed: of control and bootstrap.
        clean: as for `lens.effect`.

    Raises:
        LensError: no head, more than half of the heads (no controls are left), another `to`, prompts
            of one token, and as `lens.effect`.

    Example:
        >>> lens.sinks.head_effect(model, texts, heads=["L1H0"], to="first").table()
    """
    if to not in _EDITS:
        raise LensError(f"to must be 'off' or 'first', got {to!r}")
    chosen = selected_heads(model, None, heads)
    count, total = int(chosen.sum()), chosen.numel()
    if not 0 < 2 * count <= total:
        raise LensError(
            f"head_effect needs 1 to {total // 2} heads of {total}, so that as many others are left to "
            f"compare with; got {count}"
        )
    runs, random = clean_runs(model, clean), np.random.default_rng(seed)
    recorder = EffectRecorder(("edit", "size", "mass"))
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        before = runs.of(ids)
        mass = before.received[..., 0] / len(ids)  # [layers, heads]
        source = torch.arange(len(ids)) == 0
        for condition in recorder.conditions:
            selected = _control(condition, chosen, mass, random)
            is_source = condition == "edit"
            after = _edit(to, selected, watch=is_source)
            edited = log_probabilities(model, ids, after.on_layer)
            recorder.add(
                condition, ids, before, edited, keys=count, mass=float(mass[selected].mean())
            )
            if is_source:
                recorder.add_migration(ids, before, after.alpha(), source)
    return recorder.result(model, chosen, edit=f"heads {to}", seed=seed)


def _edit(to: str, heads: torch.Tensor, *, watch: bool) -> Watch:
    plan = _EDITS[to].plan()
    return Watch(KeyedEdit(plan, heads, "auto"), record=watch)


def _control(
    condition: str, chosen: torch.Tensor, mass: torch.Tensor, random: np.random.Generator
) -> torch.Tensor:
    """bool [layers, heads]: the heads of a condition."""
    if condition == "edit":
        return chosen
    others = (~chosen).flatten().nonzero()[:, 0].numpy()
    free, picked = list(random.permutation(others)), []
    if condition == "size":
        picked = free[: int(chosen.sum())]
    else:
        flat = mass.flatten().numpy()
        for wanted in flat[chosen.flatten().numpy()]:
            free.sort(key=lambda head: abs(flat[head] - wanted))
            picked.append(free.pop(0))
    found = torch.zeros(chosen.numel(), dtype=torch.bool)
    found[[int(head) for head in picked]] = True
    return found.view_as(chosen)
