"""Others that stand in for what an edit names: keys, heads, dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.edits.attention import AttentionOfKeys
from lens.edits.language import Edit, Running
from lens.models.loaded import LoadedModel
from lens.passes.keys import KeysAt
from lens.passes.residual import changed
from lens.stats.controls import others

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Pushed(Edit):
    """Other dimensions changed by as much as these would be if they were set to a value, at positions."""

    layer: int
    positions: tuple[int, ...]
    dims: tuple[int, ...]
    others: tuple[int, ...]
    value: float

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`; for one prompt in one pass."""

        def change(hidden: Tensor) -> Tensor:
            pushed = hidden.clone()
            for place in self.positions:
                step = self.value - hidden[:, place, list(self.dims)]
                pushed[:, place, list(self.others)] += step
            return pushed

        return Running(None, hooks=changed(model, self.layer, change))


@dataclass(frozen=True, eq=False)
class InRows(Edit):
    """An edit of keys in some rows alone: bool [layers, queries]."""

    edit: AttentionOfKeys
    rows: Tensor

    def at(self, amount: float) -> InRows:
        """See `Edit`."""
        return replace(self, edit=self.edit.at(amount))

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        running = self.edit.start(model, backend)
        running.done.plan = replace(running.done.plan, queries=by_layer(self.rows))
        return running


def by_layer(keys: Tensor) -> Callable[[KeysAt], Tensor]:
    """bool [layers, positions] as keys that differ from layer to layer."""
    return lambda at: keys[at.layer].to(at.positions.device)[at.positions[0].clamp(min=0)]


def control_keys(
    control: str,
    sources: Bool[np.ndarray, "keys"],
    mass: Float[np.ndarray, "keys"],
    random: np.random.Generator,
    free: Bool[np.ndarray, "keys"] | None = None,
) -> list[int]:
    """Keys that are no sources, for "size", "mass" or "position".

    Args:
        control: see `lens.edits.controls`.
        sources: bool [keys].
        mass: [keys], share of all attention that each key receives.
        random: draws the keys.
        free: bool [keys], those that may be drawn; None: all that are no sources.

    Raises:
        LensError: fewer other keys than sources.
    """
    left = np.flatnonzero(~sources if free is None else free)
    count = int(sources.sum())
    if len(left) < count:
        raise LensError(
            f"controls need as many other keys as are edited: {count} are, and {len(left)} others may "
            "stand in; use longer prompts or controls=()"
        )
    if control == "position":
        places = np.flatnonzero(sources)
        distance = np.abs(left[:, None] - places).min(1)
        return sorted(left[np.argsort(distance, kind="stable")[:count]].tolist())
    drawn = random.permutation(left)
    if control == "size":
        return sorted(drawn[:count].tolist())
    return keys_of_mass(drawn, mass, float(mass[sources].sum()))


def keys_of_mass(
    drawn: Int[np.ndarray, "drawn"], mass: Float[np.ndarray, "keys"], wanted: float
) -> list[int]:
    """Those of these keys, in their order, with which the mass of all does not pass what is wanted, and the one more that
    brings it nearest, if it does so or none was taken."""
    taken, left, short = [], [], wanted
    for key in drawn.tolist():
        fits = mass[key] <= short
        (taken if fits else left).append(key)
        short -= float(mass[key]) * fits
    more = min(left, key=lambda key: mass[key], default=None)
    if more is not None and (not taken or mass[more] - short < short):
        taken.append(more)
    return sorted(taken)


def other_heads(
    control: str,
    chosen: Bool[Tensor, "layers heads"],
    random: np.random.Generator,
    mass: Float[Tensor, "layers heads"],
) -> Bool[Tensor, "layers heads"]:
    """bool [layers, heads]: as many heads that are not chosen, for "size", "mass" or "layer".

    A head without attention, whose `mass` [layers, heads] is NaN, stands in for none.
    """
    free = ~chosen & ~mass.isnan()
    if control != "mass":
        drawn = others(chosen.numpy(), random, free.numpy(), within=control == "layer")
        return torch.from_numpy(drawn)
    found, flat = torch.zeros_like(chosen), mass.flatten().numpy()
    left = list(random.permutation(np.flatnonzero(free.numpy())))
    for wanted in flat[chosen.flatten().numpy()]:
        left.sort(key=lambda head: abs(flat[head] - wanted))
        found.view(-1)[int(left.pop(0))] = True
    return found


def too_many(chosen: Tensor, total: int, *controls: str) -> dict[str, str]:
    """Of these controls those that would need more other heads than the `total` has, and why."""
    count = int(chosen.sum())
    why = {}
    if 2 * count > total:
        reason = f"{count} of {total} heads are edited, so that as many others are not left"
        why |= dict.fromkeys(controls, reason)
    elif bool((2 * chosen.sum(1) > chosen.shape[1]).any()) and "layer" in controls:
        layer = int((2 * chosen.sum(1) > chosen.shape[1]).int().argmax())
        why["layer"] = (
            f"{int(chosen[layer].sum())} of the {chosen.shape[1]} heads of layer {layer} are edited"
        )
    return why


def of_kind(names: Sequence[str], kind: str) -> list[str]:
    return [name for name in names if name.endswith(kind)]


def ids_of(chosen: Tensor) -> tuple[HeadId, ...]:
    return tuple(HeadId(*pair) for pair in chosen.nonzero().tolist())


def scope_of(chosen: Tensor) -> str:
    """The chosen heads, bool [layers, heads], in words: "all heads", "layers 1 to 2", "L1H0"; "" for none."""
    if bool(chosen.all()):
        return "all heads"
    whole = chosen.all(1)
    if bool((whole == chosen.any(1)).all()) and bool(whole.any()):
        layers = whole.nonzero()[:, 0].tolist()
        if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
            return f"layers {layers[0]} to {layers[-1]}"
        return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    names = [str(one) for one in ids_of(chosen)]
    return ", ".join(names) if len(names) < 9 else f"{len(names)} heads"
