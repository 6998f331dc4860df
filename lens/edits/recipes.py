"""The published recipes as rules of `lens.redistribute`: the same sources, targets and amount for all.

    rule    sources                     targets                      amount (default)
    ======  ==========================  ===========================  =====================================
    var     the sinks; None: looked for  the image, which receives   p, taken from the sinks (0.6)
    act     none: found by alpha         none: all other keys        1 - beta, taken from the sinks (0.6)
    pasta   none: the rest of the prompt  positions to emphasise      1 - alpha, of the others' weight (0.99)

Each is the preset "paper" of `lens.edits.var`, `act` and `pasta`, which have all other numbers
and the readings of the released code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits.base import AttentionEdit
from lens.edits.calibration import act
from lens.edits.steering import pasta
from lens.edits.visual import var
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys

RECIPES = {"var": 0.6, "act": 0.6, "pasta": 0.99}
"""rule -> its amount where none is given."""


def recipe(
    rule: str,
    model: LoadedModel,
    sources: Keys | None,
    targets: Keys | None,
    amount: float | None,
    *,
    layers: Sequence[int] | None,
    heads: Sequence[AnyHead] | None,
    backend: str,
) -> AbstractContextManager[AttentionEdit]:
    """One of `RECIPES` with the arguments of `lens.redistribute`.

    Raises:
        LensError: sources or targets that the recipe finds itself or needs, or an amount out of range.
    """
    moved = RECIPES[rule] if amount is None else amount
    if isinstance(moved, bool) or not isinstance(moved, int | float) or not 0 <= moved <= 1:
        raise LensError(f"amount of rule {rule!r} is a fraction 0..1, got {moved!r}")
    if sources is not None and rule != "var":
        raise LensError(f"rule {rule!r} finds its sources itself: leave sources out")
    if (targets is None) != (rule == "act"):
        raise LensError(
            "rule 'act' gives to all other keys: leave targets out"
            if rule == "act"
            else "rule 'var' needs targets, the image keys: lens.vision.segments(...).keys('image')"
            if rule == "var"
            else "rule 'pasta' needs targets, the positions to emphasise"
        )
    if rule == "act":
        return act(model, beta=1 - moved, layers=layers, heads=heads, backend=backend)
    assert targets is not None
    if rule == "var":
        return var(
            model,
            targets,
            amount=moved,
            sinks=sources,
            layers=layers,
            heads=heads,
            backend=backend,
        )
    if moved == 1:
        raise LensError("amount of rule 'pasta' must be below 1; hide keys with rule='mask'")
    spans = _spans(targets)
    return pasta(model, spans, alpha=1 - moved, layers=layers, heads=heads, backend=backend)


def _spans(targets: Keys) -> list[tuple[int, int]]:
    """Runs (start, end) of positions."""
    if isinstance(targets, str):
        return [(0, 1)]
    if isinstance(targets, torch.Tensor):
        places = (targets.nonzero()[:, 0] if targets.dtype == torch.bool else targets).tolist()
    elif callable(targets):
        raise LensError(
            "targets of rule 'pasta' are positions or a bool mask, the same in all layers"
        )
    else:
        places = list(targets)
    runs = itertools.groupby(enumerate(sorted(set(places))), lambda pair: pair[1] - pair[0])
    found = [[place for _, place in run] for _, run in runs]
    return [(run[0], run[-1] + 1) for run in found]
