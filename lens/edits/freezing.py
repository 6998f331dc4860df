"""`Freeze`: heads keep the pattern that they had on other prompts, or without any edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, queries_at
from lens.edits.language import OfHeads, Running
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.keys import KeysAt
from lens.passes.sessions import base, listening
from lens.passes.sources import read_any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Freeze(OfHeads):
    """Heads look where they looked on other prompts, and move what this run has there.

        P' = softmax(q' k'^T), with the queries and keys of the other prompts at the same positions

    Queries and keys are held, not the pattern: nothing N×N is stored, and the mask is this run's. It acts
    before all other edits, which then edit the held pattern: `Freeze(texts), Mask("first")`.

    Attributes:
        over: one prompt, or one for each row of a batch, as for `lens.capture` and of one length, at least
            that of what is run; `lens.effect` takes the clean pass of each prompt where there is none.
        heads, layers: as of `Mask`.

    Raises:
        LensError: when it starts, no prompts or prompts of several lengths; while it runs, a position
            that they do not reach, another batch, or a layer that looks ahead at another length.

    Reference: Elhage et al., A Mathematical Framework for Transformer Circuits, 2021 (frozen patterns).

    Example:
        >>> text = "It was the best of times"
        >>> with lens.edit(model, lens.edits.Freeze(text), lens.edits.Ablate("L0.mlp")):
        ...     model.logits(text)
    """

    over: Any = field(default=None, compare=False, repr=False)

    def ready(self, model: LoadedModel, prompts: Any) -> Freeze:
        """The same with its queries and keys read, of `prompts` where it names none; copies share them."""
        if isinstance(self.over, Patterns):
            return self
        over = prompts if self.over is None else self.over
        return replace(self, over=Patterns.of(model, over))

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        if self.over is None:
            raise LensError("Freeze needs the prompts whose pattern is held: Freeze(text)")
        edit = FrozenEdit(self.ready(model, None).over, self.chosen(model), backend)
        return Running(edit, edit)


@dataclass(frozen=True, eq=False)
class Patterns:
    """What makes the patterns of prompts of one length.

    Attributes:
        query, key: of each layer and part.
    """

    query: Mapping[tuple[int, int], Float[Tensor, "prompts heads queries head_dim"]]
    key: Mapping[tuple[int, int], Float[Tensor, "prompts heads keys head_dim"]]

    @staticmethod
    def of(model: LoadedModel, prompts: Any) -> Patterns:
        """Run them as they are.

        Raises:
            LensError: prompts of several lengths.
        """
        found: list[list[LayerCall]] = []
        for prompt in read_any(model, prompts)[0]:
            calls: list[LayerCall] = []

            def keep(call: LayerCall, calls: list[LayerCall] = calls) -> Tensor:
                calls.append(call)
                return attend(call).output

            with torch.no_grad(), listening(model, keep, parts=True):
                (model.model if "pixel_values" in prompt.inputs else base(model))(**prompt.inputs)
            found.append(calls)
        lengths = sorted({(calls[0].query.shape[2], calls[0].key.shape[2]) for calls in found})
        if len(lengths) > 1:
            shown = [queries if queries == keys else (keys, queries) for queries, keys in lengths]
            raise LensError(f"prompts of Freeze must have one length, got {shown}")
        layers = {(calls[0].layer, calls[0].part): calls for calls in zip(*found, strict=True)}
        return Patterns(
            {at: torch.cat([call.query for call in calls]) for at, calls in layers.items()},
            {
                at: torch.cat([of_heads(one, one.key) for one in calls])
                for at, calls in layers.items()
            },
        )


class FrozenEdit(AttentionEdit):
    """Puts queries and keys of `Patterns` in their place; `calls` is counted, no mass is moved."""

    word = "Freeze"

    def __init__(
        self, patterns: Patterns, heads: Bool[Tensor, "layers heads"], backend: str
    ) -> None:
        super().__init__(heads, backend)
        self._patterns = patterns

    def _edit(
        self, call: LayerCall, at: KeysAt, heads: Bool[Tensor, "heads"]
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        return attend(self.frozen(call, at), backend=self._backend).output

    def frozen(self, call: LayerCall, at: KeysAt) -> LayerCall:
        """The call with the queries and keys held.

        Raises:
            LensError: prompts that are too short, or another batch.
        """
        heads = self._heads[call.layer].to(call.query.device)
        if not bool(heads.any()):
            return call
        self.calls += 1
        at_layer = call.layer, call.part
        query, key = (one[at_layer] for one in (self._patterns.query, self._patterns.key))
        batch, places, rows = len(call.query), at.positions, queries_at(call, at)
        if len(query) not in (1, batch):
            raise LensError(f"Freeze holds {len(query)} prompts and the model runs {batch}")
        for here, length in ((places, key.shape[2]), (rows, query.shape[2])):
            whole = here is rows or call.mask.causal or here.shape[1] == length
            if int(here.max()) >= length or not whole:
                raise LensError(
                    f"Freeze holds the pattern of {length} tokens and the model runs {int(here.max()) + 1}; "
                    "give prompts as long as what is run"
                )
        query = _at(query, rows).to(call.query)
        key = _at(key, places).to(call.key)
        if bool(heads.all()):
            return replace(call, query=query, key=key, value=of_heads(call, call.value))
        here = heads[:, None, None]
        return replace(
            call,
            query=torch.where(here, query, call.query),
            key=torch.where(here, key, of_heads(call, call.key)),
            value=of_heads(call, call.value),
        )


def _at(
    tensor: Float[Tensor, "#batch heads tokens head_dim"], places: Int[Tensor, "batch places"]
) -> Float[Tensor, "batch heads places head_dim"]:
    """What lies at these places of each prompt."""
    tensor = tensor.expand(len(places), -1, -1, -1)
    index = places.clamp(min=0)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index.to(tensor.device))
