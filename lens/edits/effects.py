"""`lens.effect`: what an edit changes, beside the same edit of other keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.edits._keyed import KeyedEdit, Plan
from lens.edits.attention import Bias, Drop, Mask, Move, Value
from lens.edits.base import selected_heads
from lens.edits.clean_runs import CleanRuns, clean_runs
from lens.edits.controls import CONTROLS, control_keys
from lens.edits.effect_results import Effect
from lens.edits.losses import log_probabilities, two_tokens
from lens.edits.recording import EffectRecorder
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.passes.keys import KeysAt, members

OfKeys = Mask | Drop | Bias | Move | Value


def effect(
    model: LoadedModel,
    prompts: Any,
    edit: OfKeys,
    *,
    controls: Sequence[str] = CONTROLS,
    amounts: Sequence[float] | None = None,
    seed: int = 0,
    clean: CleanRuns | None = None,
    progress: bool = True,
) -> Effect:
    """Run prompts with an edit, with the same edit of control keys, and without; compare predictions.

    A small effect does not prove that the keys are irrelevant: `migration` says whether another key
    took their place. Where the mass control could not reach the keys' mass, its row says so in `mass`.

    Args:
        model: a causal language model, as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        edit: one of `lens.edits` that names keys: `Mask`, `Drop`, `Bias`, `Move` or `Value`, with
            the same keys in every layer. Of `Move(None, to=keys)` the controls receive instead.
        controls: some of "size", "mass", "position", for which see `control_keys`, and "self": the
            same keys, while their own rows are left as they are.
        amounts: of the edit, each once, instead of its own; the control keys are the same at each.
        seed: of controls and bootstrap.
        clean: runs without an edit that other tests share with this one.
        progress: show a bar.

    Raises:
        LensError: prompts of one token or without the keys, a model that predicts no next token, another
            edit, unknown controls, no amount or one twice, `clean` of another model, and as `lens.edit`.

    Example:
        >>> found = lens.effect(model, texts, lens.edits.Mask("first", heads=["L1H0"]))
        >>> found.table()[["condition", "amount", "mass", "delta_loss", "delta_loss_low"]]
    """
    if not isinstance(edit, OfKeys):
        raise LensError(f"edit must be a Mask, Drop, Bias, Move or Value of keys, got {edit!r}")
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise LensError(f"controls must be some of {', '.join(CONTROLS)}, got {unknown}")
    doses = [edit.amount] if amounts is None else sorted(amounts)
    if not doses or len(set(doses)) < len(doses):
        raise LensError(f"amounts must be different, at least one; got {list(amounts or ())}")
    chosen, keys = selected_heads(model, edit.layers, edit.heads), edited_keys(edit)
    if not bool(chosen.any()):
        raise LensError("effect edits at least one head; layers and heads are empty")
    plans = [replace(edit, amount=amount).plan() for amount in doses]
    runs, random = clean_runs(model, clean), np.random.default_rng(seed)
    recorder = EffectRecorder(("edit", *controls), doses)
    read = [two_tokens(prompt.ids) for prompt in read_prompts(model, prompts)[0]]
    with advancing("effect", len(read), progress) as advance:
        for ids in read:
            at = KeysAt(0, 0, torch.arange(len(ids))[None], None)
            source = members("keys", keys, at)[0]
            if not bool(source.any()):
                raise LensError(f"none of the keys is in a prompt of {len(ids)} tokens")
            before = runs.of(ids)
            mass = before.received[chosen].mean(0).double().numpy() / len(ids)
            for condition in recorder.conditions:
                of_control = condition not in ("edit", "self")
                places = source.nonzero()[:, 0].tolist()
                if of_control:
                    free = ~source if edit.keys is None else ~(source | _receivers(edit, at))
                    places = control_keys(condition, source.numpy(), mass, random, free.numpy())
                for place, plan in enumerate(plans):
                    if of_control:
                        plan = _instead(edit, doses[place], places)
                    elif condition == "self":
                        plan = replace(plan, queries=tuple((~source).nonzero()[:, 0].tolist()))
                    watch = Watch(KeyedEdit(plan, chosen, "auto"), record=condition == "edit")
                    edited = log_probabilities(model, ids, watch.on_layer)
                    recorder.add(
                        condition, ids, before, edited, keys=len(places), mass=mass[places].sum()
                    )
                    if condition == "edit" and place == len(plans) - 1:
                        recorder.add_migration(ids, before, watch.alpha(), source)
            advance(1)
    return recorder.result(model, chosen, edit=named(edit), seed=seed)


def edited_keys(edit: OfKeys) -> str | Sequence[int]:
    """The keys whose importance is asked for, which controls stand in for.

    Raises:
        LensError: they may differ from layer to layer.
    """
    keys = edit.to if isinstance(edit, Move) and edit.keys is None else edit.keys
    if not isinstance(keys, str | tuple):
        raise LensError("keys of effect are the same in every layer; give positions")
    return keys


def named(edit: OfKeys) -> str:
    """The edit in a few words: "Mask first", "Value [0, 5] to mean", "Move to first"."""
    keys = edited_keys(edit)
    shown = keys if isinstance(keys, str) else str(list(keys))
    if isinstance(edit, Move) and edit.keys is None:
        return f"Move to {shown}"
    ending = f" to {edit.baseline}" if isinstance(edit, Value) else ""
    return f"{type(edit).__name__} {shown}{ending}"


def _receivers(edit: OfKeys, at: KeysAt) -> torch.Tensor:
    """bool [keys]: where a `Move` puts its mass; moved onto themselves they would be no control."""
    to = edit.to if isinstance(edit, Move) else None
    return members("to", () if to is None else to, at)[0]


def _instead(edit: OfKeys, amount: float, keys: Sequence[int]) -> Plan:
    """The same edit of other keys."""
    field = "to" if edit.keys is None else "keys"
    return replace(edit, amount=amount, **{field: tuple(keys)}).plan()
