"""Whether a sink matters: its keys are edited away, and so are control keys; the losses decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits.base import selected_heads
from lens.edits.controls import CONTROLS, control_keys
from lens.edits.losses import log_probabilities, two_tokens
from lens.edits.rules import check_rule
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.passes.keys import Keys, KeysAt, check_keys, members
from lens.sinks.effects.clean import CleanRuns, clean_runs
from lens.sinks.effects.recording import EffectRecorder
from lens.sinks.effects.results import SinkEffect
from lens.sinks.effects.watched import EDITS, WatchedEdit


def effect(
    model: LoadedModel,
    prompts: Any,
    *,
    sources: Keys = "first",
    edit: str = "mask",
    amount: float = 1.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> SinkEffect:
    """Edit the attention to `sources` away and measure what the predictions lose.

    A small effect does not prove that a sink is irrelevant: `migration` says whether another key
    took its place. Where the mass control could not reach the sources' mass, its row says so in
    `mass`.

    Args:
        model: a causal language model, as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        sources: "first", positions or a bool mask; the same in every layer.
        edit: "mask" (hide and renormalise), "drop" (leave out what the keys contribute), "mean_value",
            "zero_value", "move" (all attention goes to the keys) or "transfer" (their attention goes
            to all others); formulas in `lens.sinks.edits`.
        amount: 0..1, how much of it.
        layers, heads: what to edit, as in `lens.edits.Mask`.
        controls: some of "size", "mass", "position", for which see `control_keys`, and "self": the
            sources, while their own rows are left as they are.
        seed: of controls and bootstrap.
        clean: runs without an edit that other tests share with this one.

    Raises:
        LensError: prompts of one token or without the sources, a model that predicts no next token,
            unknown edits or controls, `clean` of another model, and as `lens.edit`.

    Example:
        >>> result = lens.sinks.effect(model, texts, sources="first", heads=["L1H0"])
        >>> result.table()[["condition", "mass", "delta_loss", "delta_loss_low", "delta_loss_high"]]
    """
    if edit not in EDITS:
        raise LensError(f"edit must be one of {', '.join(EDITS)}, got {edit!r}; others: lens.edit")
    check_rule("drop", amount, True, False)  # of all these edits the amount is a fraction
    check_keys("sources", sources)
    if callable(sources) and not isinstance(sources, torch.Tensor):
        raise LensError("sources of effect are the same in every layer; give positions")
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise LensError(f"controls must be some of {', '.join(CONTROLS)}, got {unknown}")
    chosen = selected_heads(model, layers, heads)
    if not bool(chosen.any()):
        raise LensError("effect edits at least one head; layers and heads are empty")
    runs, random = clean_runs(model, clean), np.random.default_rng(seed)
    recorder = EffectRecorder(("sources", *controls))
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        source = members("sources", sources, KeysAt(0, 0, torch.arange(len(ids))[None], None))[0]
        if not bool(source.any()):
            raise LensError(f"none of the sources is in a prompt of {len(ids)} tokens")
        places = source.nonzero()[:, 0].tolist()
        before = runs.of(ids)
        mass = before.received[chosen].mean(0).double().numpy() / len(ids)
        for condition in recorder.conditions:
            keys = places
            if condition not in ("sources", "self"):
                keys = control_keys(condition, source.numpy(), mass, random)
            is_source, spare = condition == "sources", condition == "self"
            after = WatchedEdit(keys, amount, edit, chosen, watch=is_source, spare_own=spare)
            edited = log_probabilities(model, ids, after.on_layer)
            recorder.add(condition, ids, before, edited, keys=len(keys), mass=mass[keys].sum())
            if is_source:
                recorder.add_migration(ids, before, after.alpha(), source)
    return recorder.result(model, chosen, edit=edit, amount=amount, seed=seed)
