"""One row of chosen heads forced onto chosen keys while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.edits.base import AttentionEdit, grouped, part_of, selected_heads
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt
from lens.passes.sessions import listening

_OTHERS, _TARGETS = 0, 1


@contextmanager
def redirecting(
    model: LoadedModel,
    heads: Sequence[HeadId],
    target: Tensor,
    query: Tensor,
    amount: float,
    split: str,
    backend: str,
) -> Iterator[Redirect]:
    """Force one row of each head while the block runs one batch of prompts.

    Args:
        model, heads: those that are edited.
        target: bool [rows, tokens], keys that the row is forced onto.
        query: [rows], which row.
        amount, split, backend: of `lens.circuits.redirect`; an amount of 0 only reads the masses.

    Raises:
        LensError: in the block, a layer that does not see all of the keys.
    """
    edit = Redirect(selected_heads(model, None, heads), target, query, amount, split, backend)
    with listening(model, edit.on_layer, exclusive=True):
        yield edit


class Redirect(AttentionEdit):
    """Moves attention of one row per prompt to some keys; `mass_of` keeps what was there before."""

    def __init__(
        self,
        heads: Tensor,
        target: Tensor,
        query: Tensor,
        amount: float,
        split: str,
        backend: str,
    ) -> None:
        super().__init__(heads, backend)
        self._target, self._query = target, query  # bool [rows, tokens], [rows]
        self._amount, self._split = amount, split
        self.mass_of: dict[HeadId, Tensor] = {}

    def _edit(self, call: LayerCall, at: KeysAt, heads: Tensor) -> Tensor:
        output = attend(call, backend=self._backend).output.clone()
        device = output.device
        chosen = heads.nonzero()[:, 0]
        target, query = self._target.to(device), self._query.to(device)
        start = int(query.min())
        part = part_of(call, chosen, start)  # of the chosen heads, the rows from the first query on
        result = grouped(part, torch.where(target, _TARGETS, _OTHERS).int(), self._backend)
        assert result.groups is not None
        row = torch.arange(len(query), device=device), slice(None), query - start
        seen = result.groups.lse[_TARGETS][row]  # [rows, heads]
        if not bool(torch.isfinite(seen).all()) or self._out_of_window(call, target, query):
            raise LensError(
                f"layer {at.layer} does not see all of the keys from the query (a window or a mask hides "
                "them), so its heads cannot look there; choose heads of other layers"
            )
        mass = (seen - result.statistics["lse"][row]).exp().double().cpu()
        for number, head in enumerate(chosen.tolist()):
            self.mass_of[HeadId(at.layer, head)] = mass[:, number]
        if self._split == "own":
            forced = result.groups.output[_TARGETS][row]  # [rows, heads, value_dim]
        else:
            weights = (target / target.sum(-1, keepdim=True)).to(call.value.dtype)
            share = call.query.shape[1] // call.value.shape[1]
            forced = (weights[:, None, None] @ call.value[:, chosen // share])[:, :, 0]
        if not self._amount:
            return output
        place = row[0][:, None], chosen[None], query[:, None]
        output[place] += self._amount * (forced.to(output.dtype) - output[place])
        return output

    @staticmethod
    def _out_of_window(call: LayerCall, target: Tensor, query: Tensor) -> bool:
        if call.mask.window is None:
            return False
        keys = torch.arange(target.shape[1], device=target.device)
        return bool((target & (query[:, None] - keys >= call.mask.window)).any())
