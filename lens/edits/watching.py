"""Where attention goes while edits act: what each key receives after them, and what moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.edits._keyed import KeyedEdit
from lens.edits._parts import HeadsOut
from lens.edits.base import AttentionEdit
from lens.edits.freezing import FrozenEdit
from lens.edits.running import Together
from lens.passes.calls import LayerCall, attend, cut
from lens.passes.keys import KeysAt, members
from lens.traces.scores import FEWEST_VIEWERS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_HIDDEN = -60.0
"""Added to logits instead of -inf: a row that sees nothing else keeps its attention, as in an edit."""


class Watch:
    """Stands in the model's attention, for prompts in one pass each; lets edits act, or none.

    Attributes:
        received: per layer [heads, keys], sum over the queries (or `rows`) of the edited attention; NaN
            where edits leave it no softmax with fixed weights (`Move` to some of the others, a recipe,
            several on one head); 0 of heads that are taken out.
        visible: per layer [keys], number of these queries that see each key.
        queries: of all.
        hides: bool [tokens - 1], whose next token no row up to there sees in any layer; None: all.
    """

    def __init__(
        self,
        *edits: AttentionEdit,
        rows: Bool[Tensor, "tokens"] | None = None,
        record: bool = True,
        ahead: bool = False,
    ) -> None:
        """`rows`: those that are looked at, and the only ones edited; None: all.
        `ahead`: layers may see later tokens, as no next token is predicted."""
        self.received: list[Tensor] = []
        self.visible: list[Tensor] = []
        self.queries = 0
        self.hides: Tensor | None = None
        self._edits, self._rows, self._record, self._ahead = edits, rows, record, ahead
        self._together = Together(list(edits), "auto")

    def on_layer(self, call: LayerCall) -> Float[Tensor, "batch heads queries value_dim"]:
        """See `lens.passes.sessions.listening`.

        Raises:
            LensError: a layer that looks ahead from every token: there is no next-token loss.
        """
        if not call.mask.causal and not self._ahead:
            hidden = call.mask.hides_next(call.key.shape[2])
            self.hides = hidden if self.hides is None else self.hides & hidden
            if not bool(self.hides.any()):
                raise LensError(
                    f"layer {call.layer} sees later tokens, so there is no next-token loss to change; "
                    "effect needs a causal language model, or an answer behind what is seen both ways"
                )
        if self._record and not call.part:  # a layer that attends twice does so with one pattern
            keys, self.queries = call.key.shape[2], call.query.shape[2]
            at = KeysAt(
                call.layer, 0, torch.arange(keys, device=call.key.device)[None], call.tokens
            )
            held = self._together.frozen(call, at)
            self.received.append(self._after(held, at).cpu())
            parts = _stretches(call, self._rows)
            seen = [part.mask.visible(1, part.query.shape[2], part.key.shape[2]) for part in parts]
            self.visible.append(sum(_to(one[0], keys) for one in seen).cpu())  # type: ignore[union-attr]
        return self._together.on_layer(call)

    def layers_received(self) -> Float[Tensor, "layers heads keys"]:
        """`received` in one; [0, 1, 1] of a model without softmax attention."""
        return torch.stack(self.received) if self.received else torch.zeros(0, 1, 1)

    def alpha(self) -> Float[Tensor, "layers heads keys"]:
        """`received / visible`, NaN as in `lens.sinks.detection.alphas.alpha_of`."""
        received = self.layers_received()
        if not len(received):
            return received
        visible = torch.stack(self.visible)[:, None]
        fewest = torch.full_like(visible, FEWEST_VIEWERS)
        fewest[..., 0] = 1
        return torch.where(visible >= fewest, received / visible.clamp(min=1), torch.nan)

    def _after(self, call: LayerCall, at: KeysAt) -> Tensor:
        """[heads, keys]: what each key receives once the edits have acted."""
        found = _received(call, self._rows)
        edits = [one for one in self._edits if not isinstance(one, FrozenEdit)]
        before, mine = found, [one for one in edits if bool(one.heads[call.layer].any())]
        for one in mine:
            heads = one.heads[call.layer].to(found.device)
            others = [o.heads[call.layer] for o in mine if o is not one]
            alone = not any(bool((heads & o.to(heads)).any()) for o in others)
            if isinstance(one, HeadsOut):
                found = found.masked_fill(heads[:, None], 0.0)
            elif alone and isinstance(one, KeyedEdit):
                found = torch.where(heads[:, None], self._keyed(one, call, at, before), found)
            else:
                found = found.masked_fill(heads[:, None], torch.nan)
        return found

    def _keyed(self, edit: KeyedEdit, call: LayerCall, at: KeysAt, found: Tensor) -> Tensor:
        """[heads, keys] after one edit of keys in all heads; NaN where that is not known."""
        plan, unknown = edit.plan, torch.full_like(found, torch.nan)
        if plan.amount == 0:
            return found
        if plan.keys is None or (plan.queries is not None and self._rows is None):
            return unknown
        source = members("keys", plan.keys, at)[0]
        weight = torch.where(source, 1 - plan.amount, 1.0)
        match plan.rule:
            case "zero" | "mean":
                return found
            case "drop":
                return found * weight
            case "mask":
                return _received(call, self._rows, weight.log().clamp(min=_HIDDEN))
            case "bias":
                return _received(
                    call, self._rows, torch.where(source, max(plan.amount, _HIDDEN), 0.0)
                )
            case "equal" if self._rows is not None:
                share = source * (int(self._rows.sum()) / source.sum())
                return found + plan.amount * (share - found)
        if call.sink_logits is not None:
            return unknown
        if plan.rule == "own" or (plan.rule == "move" and _to_all_others(edit, source, at)):
            if not bool(source.any()):
                return found
            hidden = ~source if plan.rule == "own" else source
            moved = _received(call, self._rows, torch.where(hidden, _HIDDEN, 0.0))
            return found + plan.amount * (moved - found)
        return unknown


def _to_all_others(edit: KeyedEdit, source: Tensor, at: KeysAt) -> bool:
    to = edit.plan.to
    return to is None or torch.equal(members("to", to, at)[0], ~source)


def _received(call: LayerCall, rows: Tensor | None, extra: Tensor | None = None) -> Tensor:
    """[heads, keys]: attention that each key receives, with `extra` [keys] on its logits."""
    total = torch.zeros(call.query.shape[1], call.key.shape[2], device=call.key.device)
    for part in _stretches(call, rows):
        mask, keys = part.mask.for_kernel(part.query.shape[2]), part.key.shape[2]
        bias = part.position_bias
        if extra is not None:
            bias = extra[:keys] if bias is None else bias + extra[:keys]
        if bias is not None:
            bias = bias.to(part.query.dtype)
            mask = replace(mask, bias=bias.expand(*[1] * (4 - bias.dim()), *bias.shape))
        found = attend(part, mask=mask, statistics=("received",)).statistics["received"][0]
        total = total + _to(found, total.shape[1])
    return total


def _stretches(call: LayerCall, rows: Tensor | None) -> Iterator[LayerCall]:
    """The call of each stretch of chosen queries and the keys that it may see; of one prompt, in one pass."""
    if rows is None:
        yield call
        return
    steps = torch.nn.functional.pad(rows.int(), (1, 1)).diff()
    starts, ends = ((steps == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
    for first, end in zip(starts, ends, strict=True):
        mask, queries = call.mask, slice(first, end)
        keys = slice(end if mask.causal else None)
        if mask.allowed is not None:
            mask = mask.with_allowed(mask.allowed[:, :, queries, keys])
        if mask.padding is not None:
            mask = replace(mask, padding=mask.padding[:, keys])
        yield replace(
            call,
            query=call.query[:, :, queries],
            key=call.key[:, :, keys],
            value=call.value[:, :, keys],
            mask=mask,
            position_bias=cut(call.position_bias, queries=queries, keys=keys),
        )


def _to(received: Tensor, keys: int) -> Tensor:
    return torch.nn.functional.pad(received, (0, keys - received.shape[-1]))


def moved(
    before: Float[Tensor, "layers heads keys"],
    after: Float[Tensor, "layers heads keys"],
    source: Bool[Tensor, "layers 1 keys"],
) -> Float[np.ndarray, "5 layers heads"]:
    """[5, layers, heads]: the columns of `Effect.migration` for one prompt."""

    def largest(alpha: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        found = alpha.nan_to_num(nan=-1).masked_fill(~keys, -1).max(-1)
        return found.values.masked_fill(found.values < 0, torch.nan), found.indices

    columns = [largest(alpha, keys) for keys in (source, ~source) for alpha in (before, after)]
    return torch.stack([*(value for value, _ in columns), columns[-1][1]]).double().numpy()


def migration(moves: Sequence[np.ndarray]) -> pd.DataFrame:
    """One row per layer and head out of `moved` of every prompt."""
    stacked = np.stack(moves)
    _, _, layers, heads = stacked.shape
    names = ("source_before", "source_after", "other_before", "other_after")
    table = pd.DataFrame(
        {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
    )
    for place, name in enumerate(names):
        table[name] = stacked[:, place].mean(0).ravel()
    places = stacked[:, 4].reshape(len(moves), -1).astype(int)
    table["other_key"] = [np.bincount(column).argmax() for column in places.T]
    return table.dropna(how="all", subset=list(names)).reset_index(drop=True)
