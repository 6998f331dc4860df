"""An edit that also records `alpha` as it is after the edit: where the attention went."""

from __future__ import annotations

from dataclasses import replace

import torch
from lens_kernels import attention

from lens.captures.layer import LayerCall
from lens.errors import LensError
from lens.redistribution.editing import Edit
from lens.redistribution.keys import KeysAt, members
from lens.scores import FEWEST_VIEWERS

_HIDDEN = -60.0
"""Added to logits instead of -inf: a row that sees nothing else keeps its attention, as in an edit."""


class WatchedEdit(Edit):
    """`Edit` with rule "mask" or "drop" of fixed positions, for prompts in one pass each.

    Attributes:
        received: per layer [heads, keys], sum over the queries of the edited attention.
        visible: per layer [keys], number of queries that see each key.
    """

    def __init__(
        self,
        sources: list[int],
        amount: float,
        rule: str,
        heads: torch.Tensor,
        *,
        watch: bool,
    ) -> None:
        super().__init__(sources, None, amount, rule, heads, "auto")
        self.received: list[torch.Tensor] = []
        self.visible: list[torch.Tensor] = []
        self._watch = watch

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See `interface.Listener`.

        Raises:
            LensError: a layer that looks ahead: there is no next-token loss.
        """
        if not call.mask.causal:
            raise LensError(
                f"layer {self._layer} sees later tokens, so there is no next-token loss to change; "
                "effect needs a causal language model"
            )
        if self._watch:
            self._record(call, self._layer)
        return super().attend(call)

    def alpha(self) -> torch.Tensor:
        """[layers, heads, keys]: `received / visible`, NaN as in `lens.sinks.alphas.alpha_of`."""
        received, visible = torch.stack(self.received), torch.stack(self.visible)[:, None]
        fewest = torch.full_like(visible, FEWEST_VIEWERS)
        fewest[..., 0] = 1
        return torch.where(visible >= fewest, received / visible.clamp(min=1), torch.nan)

    def _record(self, call: LayerCall, layer: int) -> None:
        batch, _, queries, _ = call.query.shape
        keys = call.key.shape[2]
        at = KeysAt(layer, 0, torch.arange(keys, device=call.key.device)[None], None)
        assert self._sources is not None
        source = members("sources", self._sources, at)[0]
        edited = self._heads[layer].to(source.device)[:, None] & source  # [heads, keys]
        weight = torch.where(edited, 1 - self._amount, 1.0)
        mask = call.mask.for_kernel(queries)
        bias = call.position_bias
        if self._rule == "mask":
            extra = weight.log().clamp(min=_HIDDEN)[None, :, None]
            bias = extra if bias is None else bias + extra
            weight = torch.ones_like(weight)
        found = attention(
            call.query,
            call.key,
            call.value,
            mask=mask if bias is None else replace(mask, bias=bias.to(call.query.dtype)),
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            statistics=("received",),
        ).statistics["received"][0]
        self.received.append((found * weight).cpu())
        self.visible.append(call.mask.visible(batch, queries, keys)[0].cpu())
