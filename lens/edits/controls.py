"""What an edit is compared with: the same done to others, as many, of as much mass, or next to them.

    size      as many others at random: keys; of edits without keys heads, sub-layers, dimensions or directions
    mass      others that hold as much attention together: random keys, added until theirs comes nearest
              (where a sink holds most of the mass that may not be reached); heads whose attention to the
              first key is nearest
    position  the nearest other keys; the same dimensions one position later
    self      the same keys, while their own rows are left as they are
    layer     the same in as many random other heads of the same layers
    norm      as many random other dimensions, changed by as much

Each kind of edit has those that make sense for it; of the others `Kind.missing` says why there is none.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.results import counted
from lens.edits._others import (
    InRows,
    Pushed,
    by_layer,
    control_keys,
    ids_of,
    of_kind,
    other_heads,
    scope_of,
    too_many,
)
from lens.edits._phi import width_of
from lens.edits.attention import AttentionOfKeys, Force, Knockout, Move
from lens.edits.base import selected_heads
from lens.edits.clean_runs import CleanRun, CleanRuns
from lens.edits.language import Edit, OfHeads
from lens.edits.parts import Ablate, Activation
from lens.edits.subspaces import Subspace
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.keys import Keys, KeysAt, members
from lens.passes.sublayers import named_sublayers

if TYPE_CHECKING:
    from jaxtyping import Bool

Control = Literal["size", "mass", "position", "self", "layer", "norm"]
CONTROLS: tuple[Control, ...] = get_args(Control)
DRAWN = ("size", "mass", "layer", "norm")
"""Those that are random."""
_KINDS = (".attention", ".mlp")


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt that edits are tried on.

    Attributes:
        prompt: what is run.
        before: its clean run.
        runs: where that came from.
        free: the keys that controls may take.
        random: draws them.
    """

    prompt: Prompt
    before: CleanRun
    runs: CleanRuns
    free: Bool[Tensor, "layers keys"]
    random: np.random.Generator

    def members(self, name: str, keys: Keys | None) -> Bool[Tensor, "layers keys"]:
        """Which keys are meant."""
        part, prompt = self.runs.model.chosen, self.prompt
        ids = prompt.ids if part in ("encoder", "cross") else prompt.predicted
        layers, count = self.free.shape
        found = [_members(name, keys, layer, count, ids) for layer in range(layers)]
        return torch.stack(found)

    def rows(self, name: str, queries: Keys) -> Bool[Tensor, "queries"]:
        """Which rows are meant."""
        if self.runs.model.chosen == "cross":
            return _members(name, queries, 0, self.before.queries, None)
        return self.members(name, queries)[0]

    def scored(self, places: Keys) -> Bool[Tensor, "tokens"]:
        """Which of the tokens that are predicted are meant."""
        ids = self.prompt.predicted or []
        return _members("scored", places, 0, len(ids), ids)


def _members(name: str, keys: Keys | None, layer: int, count: int, ids: list[int] | None) -> Tensor:
    tokens = torch.tensor([ids]) if ids is not None and len(ids) == count else None
    at = KeysAt(layer, 0, torch.arange(count)[None], tokens)
    return members(name, () if keys is None else keys, at)[0]


@dataclass(frozen=True, eq=False)
class Trial:
    """One condition of one prompt.

    Attributes:
        edits: what is done.
        count: how many keys, heads, sub-layers or coordinates it edits.
        mass: share of the attention of the edited heads that these keys held before, or that the heads
            gave to the first key; NaN where there is no such thing.
    """

    edits: tuple[Edit, ...]
    count: float
    mass: float


class Kind(ABC):
    """An edit in one model, and what stands in for it.

    Attributes:
        chosen: the heads whose attention is looked at.
        scope: what is edited, in words.
        usual: its controls where none are named.
        held: where the attention lay that a trial's `mass` counts, in words.
        why: control -> why there is none.
    """

    usual: tuple[Control, ...] = ()
    held = "went to the first key"
    why: dict[str, str]
    chosen: Bool[Tensor, "layers heads"]
    scope: str

    def missing(self, control: str) -> str | None:
        """Why this control makes no sense here; None where it does."""
        return self.why.get(control)

    @abstractmethod
    def trial(self, condition: str, case: Case) -> Trial:
        """What is done in "edit" or in a control that is not missing.

        Raises:
            LensError: the prompt has too few others.
        """

    def sources(self, case: Case) -> Bool[Tensor, "layers keys"]:
        """Keys whose attention is looked at before and after: the first, where no key is edited."""
        found = torch.zeros_like(case.free)
        found[:, 0] = True
        return found

    def rows(self, case: Case) -> Bool[Tensor, "queries"] | None:
        """The queries that are edited; None: all."""
        return None


class OfKeys(Kind):
    """`Mask`, `Drop`, `Bias`, `Move`, `Value`, `Knockout`, `Force`."""

    usual = ("size", "mass", "position", "self")
    held = "lay there"

    def __init__(self, model: LoadedModel, edit: AttentionOfKeys) -> None:
        self._edit = edit
        self.chosen, self.scope = edit.chosen(model), scope_of(edit.chosen(model))
        self._keys: Keys = getattr(edit, edit.asked)
        self.why = {"norm": "keys have no dimension to change by as much"} | too_many(
            self.chosen, len(model.info.every_head), "layer"
        )
        if isinstance(edit, Knockout | Force):
            self.usual = self.usual[:-1]
            self.why["self"] = "its rows are chosen already"
        elif model.chosen == "cross":
            self.why["self"] = "keys of the source are no rows of the target"

    def rows(self, case: Case) -> Bool[Tensor, "queries"] | None:
        if not isinstance(self._edit, Knockout | Force):
            return None
        found = case.rows("queries", self._edit.queries)
        if not bool(found.any()):
            raise LensError(f"none of the queries is in a prompt of {len(found)} tokens")
        return found

    def sources(self, case: Case) -> Bool[Tensor, "layers keys"]:
        found = case.members("keys", self._keys)
        if not bool(found[self.chosen.any(1)].any()):
            raise LensError(f"none of the keys is in a prompt of {found.shape[1]} tokens")
        return found

    def trial(self, condition: str, case: Case) -> Trial:
        source, edit, chosen = self.sources(case), self._edit, self.chosen
        received, queries = self._received(case)
        if condition == "layer":
            chosen = other_heads("layer", chosen, case.random, case.before.received[..., 0])
            edit = replace(edit, heads=ids_of(chosen), layers=None)
        elif condition == "self":
            edit = InRows(edit, ~source)
        elif condition != "edit":
            source = self._others(condition, source, received, case)
            keys: Keys = by_layer(source)
            if not callable(self._keys):
                keys = tuple(source[0].nonzero()[:, 0].tolist())
            edit = replace(edit, **{self._edit.asked: keys})
        shares = (received * source[:, None]).sum(-1)[chosen] / queries
        count = source.sum(1)[chosen.any(1)].double().mean()
        return Trial((edit,), float(count), float(shares.double().mean()))

    def _received(self, case: Case) -> tuple[Tensor, int]:
        """[layers, heads, keys] that each key receives from the edited rows, and how many they are."""
        rows = self.rows(case)
        if rows is None:
            return case.before.received, case.before.queries
        return case.runs.run(case.prompt, rows).received, int(rows.sum())

    def _others(self, control: str, source: Tensor, received: Tensor, case: Case) -> Tensor:
        """bool [layers, keys] of a control: one choice for all layers, or one for each with its own keys."""
        may = case.free & ~source
        if isinstance(self._edit, Move) and self._edit.keys is not None:
            may &= ~case.members("to", self._edit.to)
        found, by_layer = torch.zeros_like(source), callable(self._keys)
        for layer, heads in enumerate(self.chosen if by_layer else self.chosen[:1]):
            here = received[layer][heads] if by_layer else received[self.chosen]
            if len(here) and bool(source[layer].any()):
                mass = here.mean(0).double().numpy()
                own, free = source[layer].numpy(), may[layer].numpy()
                found[layer, control_keys(control, own, mass, case.random, free)] = True
        return found if by_layer else found[:1].expand_as(found)


class OfWholeHeads(Kind):
    """Edits of whole heads, and of sub-layers: `Ablate`, `LearnedSink`, `Var`, `Act`, `Pasta`."""

    usual = ("size", "mass", "layer")

    def __init__(self, model: LoadedModel, edit: Ablate | OfHeads) -> None:
        self._edit, self.chosen = edit, edit.chosen(model)
        self._parts = edit.sublayers if isinstance(edit, Ablate) else ()
        heads = scope_of(self.chosen) if bool(self.chosen.any()) else ""
        self.scope = ", ".join(filter(None, (heads, *self._parts)))
        self.why = dict.fromkeys(("position", "self"), "whole heads or sub-layers are edited")
        self.why |= {"norm": "no dimension is set"} | too_many(
            self.chosen, len(model.info.every_head), "size", "mass", "layer"
        )
        if self._parts:
            self.why |= dict.fromkeys(("mass", "layer"), "sub-layers pay no attention")
            self._names = [one for one in named_sublayers(model) if one not in self._parts]
            for kind in _KINDS:
                mine, others = (of_kind(names, kind) for names in (self._parts, self._names))
                if len(others) < len(mine):
                    self.why["size"] = (
                        f"{len(mine)} sub-layers {kind[1:]} are edited and {len(others)} others are left"
                    )

    def trial(self, condition: str, case: Case) -> Trial:
        mass = case.before.received[..., 0] / case.before.queries  # [layers, heads]
        chosen, parts, edit = self.chosen, self._parts, self._edit
        if condition != "edit":
            if bool(chosen.any()):
                chosen = other_heads(condition, chosen, case.random, mass)
            if isinstance(edit, Ablate):
                parts = self._other_parts(case.random)
                edit = replace(edit, what=(*ids_of(chosen), *parts))
            else:
                edit = replace(edit, heads=ids_of(chosen), layers=None)
        held = float(mass[chosen].mean()) if bool(chosen.any()) else float("nan")
        return Trial((edit,), int(chosen.sum()) + len(parts), held)

    def _other_parts(self, random: np.random.Generator) -> list[str]:
        """As many random sub-layers of each kind."""
        found: list[str] = []
        for kind in _KINDS if self._parts else ():
            count = len(of_kind(self._parts, kind))
            found += random.permutation(of_kind(self._names, kind))[:count].tolist()
        return found


class OfCoordinates(Kind):
    """`Activation`, one or several."""

    usual = ("size", "norm", "position")
    held = "lay there"

    def __init__(self, model: LoadedModel, edits: Sequence[Activation]) -> None:
        self._edits = tuple(sorted(edits, key=lambda one: one.layer))
        self.chosen = selected_heads(model, None, None)
        count = sum(len(one.places) * len(one.dims) for one in edits)
        layers = sorted({one.layer for one in edits})
        self.scope = f"{counted(count, 'coordinate')} after layer {', '.join(map(str, layers))}"
        own = {dim for one in edits for dim in one.dims}
        self._others = [dim for dim in range(width_of(model)) if dim not in own]
        self.why = dict.fromkeys(("mass", "self"), "a coordinate pays no attention")
        self.why["layer"] = "the stream of a layer has no heads"
        if max(sum(len(one.dims) for one in self._of(layer)) for layer in layers) > len(
            self._others
        ):
            self.why |= dict.fromkeys(("size", "norm"), "too few other dimensions are left")

    def _of(self, layer: int) -> list[Activation]:
        return [one for one in self._edits if one.layer == layer]

    def _positions(self) -> set[int]:
        return {place for one in self._edits for place in one.places}

    def _shift(self) -> int:
        """How far the same places are moved so that none is one of the edit's."""
        own = self._positions()
        return next(by for by in itertools.count(1) if not own & {place + by for place in own})

    def sources(self, case: Case) -> Bool[Tensor, "layers keys"]:
        longest, length = max(self._positions()), case.free.shape[1]
        needed = longest + 1 + self._shift()
        if length < needed:
            raise LensError(
                f"activations reach position {longest}; a prompt has only {length} tokens, give prompts "
                f"of at least {needed}"
            )
        found = torch.zeros_like(case.free)
        found[:, sorted(self._positions())] = True
        return found

    def trial(self, condition: str, case: Case) -> Trial:
        shift, edits = self._shift() if condition == "position" else 0, []
        for layer in dict.fromkeys(one.layer for one in self._edits):
            drawn = iter(case.random.permutation(self._others).tolist())
            for one in self._of(layer):
                others = [next(drawn) for _ in one.dims] if condition in ("size", "norm") else []
                if condition == "edit":
                    edits.append(one)
                elif condition == "norm":
                    edits.append(Pushed(layer, one.places, one.dims, tuple(others), one.value))
                else:
                    places = [place + shift for place in one.places]
                    edits.append(Activation(layer, places, others or one.dims, one.value))
        mass = case.before.received[self.chosen].mean(0).double() / case.free.shape[1]
        held = mass[[place + shift for place in sorted(self._positions())]].sum()
        count = sum(len(one.places) * len(one.dims) for one in self._edits)
        return Trial(tuple(edits), count, float(held))


class OfDirections(Kind):
    """`Subspace`, beside as many random directions."""

    usual = ("size",)

    def __init__(self, model: LoadedModel, edit: Subspace) -> None:
        self._edit, self.chosen = edit, edit.chosen(model)
        count = edit.basis.shape[1]
        self.scope = f"{counted(count, 'direction')} of {scope_of(self.chosen)}"
        self.why = dict.fromkeys(
            ("mass", "position", "self", "layer", "norm"),
            "directions are edited, not keys or heads",
        )

    def trial(self, condition: str, case: Case) -> Trial:
        edit = self._edit
        if condition == "size":
            seed = int(case.random.integers(2**31))
            edit = edit.drawn(torch.Generator().manual_seed(seed))
        return Trial((edit,), edit.basis.shape[1], float("nan"))


def kinds_of(model: LoadedModel, edits: Sequence[Edit]) -> list[Kind]:
    """What stands in for each of the edits; coordinates are set together.

    Raises:
        LensError: something else than an edit, or one of no head.
    """
    found: list[Kind] = []
    if places := [one for one in edits if isinstance(one, Activation)]:
        found.append(OfCoordinates(model, places))
    for edit in edits:
        if isinstance(edit, Activation):
            continue
        if isinstance(edit, Edit) and (own := edit.kind(model)) is not None:
            found.append(own)
            continue
        if not isinstance(edit, OfHeads | Ablate):
            raise LensError(f"edit must be one of lens.edits, such as Mask('first'), got {edit!r}")
        if isinstance(edit, Subspace):
            found.append(OfDirections(model, edit))
            continue
        whole = isinstance(edit, Ablate) or not getattr(edit, "_keys", ())
        kind = OfWholeHeads(model, edit) if whole else OfKeys(model, edit)  # type: ignore[arg-type]
        if not kind.scope:
            raise LensError("effect edits at least one head; layers and heads are empty")
        found.append(kind)
    return found
