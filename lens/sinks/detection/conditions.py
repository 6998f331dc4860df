"""Prompts beside prompts: controls without meaning, other lengths, the same text without BOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.edits.losses import two_tokens
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.vocabulary import ordinary_ids
from lens.passes.inputs import read_prompts
from lens.stats.controls import drawing

_SHORTEST = 16
Prompts = dict[str, list[list[int]]]


def bos_pair(model: LoadedModel, prompts: Any) -> Prompts:
    """The same tokens with the model's BOS in front and without it, of one length each.

    The two differ in what is the first key; the sink depends on the first token, whatever it is. The
    last token is left out where the BOS comes in.

    Args:
        model: one with a BOS token.
        prompts: as for `lens.capture`, token prompts, with BOS or without.

    Raises:
        LensError: a model without BOS, prompts of fewer than three tokens.
    """
    check_loaded(model)
    if model.bos_id is None:
        raise LensError(f"{model.name} has no BOS token, so there is no pair to compare")
    bodies = []
    for ids in _read(model, prompts):
        bodies.append(ids[1:] if ids[0] == model.bos_id else ids)
        if len(bodies[-1]) < 2:
            raise LensError("prompts need at least two tokens behind the BOS")
    return {
        "with BOS": [[model.bos_id, *body[:-1]] for body in bodies],
        "without BOS": bodies,
    }


def by_length(model: LoadedModel, prompts: Any, lengths: Sequence[int] | None = None) -> Prompts:
    """The prompts cut to each length, by default 16, 32, 64, ... and the shortest prompt's own.

    Raises:
        LensError: no length, or a prompt shorter than the longest.
    """
    read = _read(model, prompts)
    shortest = min(len(ids) for ids in read)
    if lengths is None:
        powers = (1 << power for power in range(shortest.bit_length()))
        lengths = [*(power for power in powers if _SHORTEST <= power < shortest), shortest]
    if not len(lengths) or not 2 <= min(lengths) <= max(lengths) <= shortest:
        raise LensError(f"lengths must be 2 to {shortest} (the shortest prompt), got {lengths}")
    return {f"T = {length}": [ids[:length] for ids in read] for length in sorted(set(lengths))}


def control_prompts(model: LoadedModel, prompts: Any, seed: int = 0) -> Prompts:
    """Negative controls of the same number and lengths: "random" and "repeated" tokens.

    "random" keeps a prompt's BOS token, if it begins with it, and draws all others uniformly, special
    tokens excepted. "repeated" is one token of the prompt, again and again, without BOS: in a model
    with rotary positions, ALiBi or none all its states are equal, and no key can be a sink (Gu et al.,
    arXiv 2410.10781).

    Raises:
        LensError: prompts of one token, or a model without a vocabulary.
    """
    check_counts(0, seed=seed)
    check_loaded(model)
    ordinary = np.array(ordinary_ids(model))
    random, repeated = [], []
    for ids in _read(model, prompts):
        kept = ids[:1] if model.bos_id is not None and ids[0] == model.bos_id else []
        drawn = drawing(seed, *ids).integers(len(ordinary), size=len(ids) - len(kept))
        random.append(kept + ordinary[drawn].tolist())
        repeated.append([ids[len(ids) // 2]] * len(ids))
    return {"random": random, "repeated": repeated}


def _read(model: LoadedModel, prompts: Any) -> list[list[int]]:
    return [two_tokens(prompt.ids) for prompt in read_prompts(model, prompts)[0]]
