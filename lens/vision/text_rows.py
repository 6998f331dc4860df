"""Attention from the text after an image alone: where it goes, and the same with some image keys hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, part_of
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt


class TextRows(AttentionEdit):
    """Hides keys from the rows of text after an image, other rows keep their bits.

    Attributes:
        received: per layer [edited heads, keys], what these rows gave to each key, as edited.
    """

    def __init__(
        self,
        runs: Sequence[tuple[int, int]],
        hidden: Sequence[torch.Tensor] | None,
        heads: torch.Tensor,
        backend: str = "auto",
    ) -> None:
        """Text rows as runs (first, end), and bool [keys] to hide per layer; None hides nothing."""
        super().__init__(heads, backend)
        self.received: dict[int, torch.Tensor] = {}
        self._runs, self._hidden = runs, hidden

    def _edit(self, call: LayerCall, at: KeysAt, heads: torch.Tensor) -> torch.Tensor | None:
        keys = call.key.shape[2]
        if not call.mask.causal:
            raise LensError(
                f"layer {at.layer} sees later tokens; text edges are defined for causal models"
            )
        none = torch.zeros(keys, dtype=torch.bool, device=call.key.device)
        hidden = none if self._hidden is None else self._hidden[at.layer].to(none.device)
        chosen = heads.nonzero()[:, 0]
        output = attend(call, backend=self._backend).output.clone()
        self.received[at.layer] = torch.zeros(len(chosen), keys, device=call.key.device)
        part = part_of(call, chosen)
        for first, end in self._runs:
            rows = _rows(part, first, end, hidden if bool(hidden.any()) else None)
            result = attend(rows, statistics=("received",), backend=self._backend)
            self.received[at.layer][:, :end] += result.statistics["received"][0]
            if bool(hidden.any()):
                output[:, chosen, first:end] = result.output
        return output


def _rows(call: LayerCall, first: int, end: int, hidden: torch.Tensor | None) -> LayerCall:
    """Queries [first, end) of a prompt without padding, and the keys that they may see."""
    mask, bias = call.mask, call.position_bias
    if mask.allowed is not None:
        allowed = mask.allowed[:, :, first:end, :end]
        mask = replace(mask, allowed=allowed if hidden is None else allowed & ~hidden[:end])
    else:
        mask = replace(mask, padding=None if hidden is None else ~hidden[None, :end])
    if bias is not None:
        bias = (bias if bias.shape[2] == 1 else bias[:, :, first:end])[..., :end]
    return replace(
        call,
        query=call.query[:, :, first:end],
        key=call.key[:, :, :end],
        value=call.value[:, :, :end],
        mask=mask,
        position_bias=bias,
    )
