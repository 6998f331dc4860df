"""What a causal test does to the attention paid to some keys, while it records where attention goes.

With `m_S` the mass of the sources in a row, `o` its output and `v` the values, at amount 1:

    mask          keys hidden, the rest renormalised                            (E1)
    drop          the sources' part left out: o - sum_S P v, rows sum to 1 - m_S (E2)
    mean_value    their values replaced by the mean of the other values so far   (E3)
    zero_value    their values replaced by 0; the same number as drop            (E4)
    move          all mass of the row put on the sources, pro rata               (E6)
    transfer      the sources' mass given to the other keys, pro rata; at a part of the amount rows
                  keep their sum, which `mask` reaches by dividing the sources' rest too

METHODS-ATTENTION 1.9. The mean of E3 runs over the other keys up to the row itself: one mean over the
whole prompt would tell a row what comes later.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lens.common.errors import LensError
from lens.edits.base import grouped
from lens.edits.editing import Edit
from lens.edits.rules import REST, SOURCES
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt, members
from lens.traces.scores import FEWEST_VIEWERS

EDITS = ("mask", "drop", "mean_value", "zero_value", "move", "transfer")
_HIDDEN = -60.0
"""Added to logits instead of -inf: a row that sees nothing else keeps its attention, as in an edit."""


class WatchedEdit(Edit):
    """One of `EDITS` at fixed positions, for prompts in one pass each, which records alpha after it.

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
        spare_own: bool = False,
    ) -> None:
        """`spare_own` leaves the rows of the sources themselves as they are."""
        super().__init__(sources, None, amount, rule, heads, "auto")
        self.received: list[torch.Tensor] = []
        self.visible: list[torch.Tensor] = []
        self._watch = watch
        self._spare_own = spare_own

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`.

        Raises:
            LensError: a layer that looks ahead: there is no next-token loss.
        """
        if not call.mask.causal:
            raise LensError(
                f"layer {call.layer} sees later tokens, so there is no next-token loss to change; "
                "effect needs a causal language model"
            )
        if self._watch:
            self._record(call)
        return super().on_layer(call)

    def alpha(self) -> torch.Tensor:
        """[layers, heads, keys]: `received / visible`, NaN as in `lens.sinks.alphas.alpha_of`."""
        received, visible = torch.stack(self.received), torch.stack(self.visible)[:, None]
        fewest = torch.full_like(visible, FEWEST_VIEWERS)
        fewest[..., 0] = 1
        return torch.where(visible >= fewest, received / visible.clamp(min=1), torch.nan)

    def _edited(self, call: LayerCall, groups: torch.Tensor) -> torch.Tensor:
        source = groups == SOURCES  # [batch, keys]
        if self._rule in ("mask", "drop", "transfer"):
            edited = super()._edited(call, groups)
        else:
            self.calls += 1
            edited = self._instead(call, groups, source)
            if self._amount < 1:  # both parts positive: nothing is taken off a rounded output
                plain = attend(call, backend=self._backend).output.float()
                mixed = (1 - self._amount) * plain + self._amount * edited.float()
                edited = mixed.to(edited.dtype)
        if not self._spare_own:
            return edited
        own = source[:, None, :, None]
        return torch.where(own, attend(call, backend=self._backend).output, edited)

    def _instead(self, call: LayerCall, groups: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """The output at amount 1 of the rules that `lens.edits.editing` has not."""
        if self._rule == "zero_value":
            value = call.value.masked_fill(source[:, None, :, None], 0)
            return attend(replace(call, value=value), backend=self._backend).output
        result = grouped(call, groups, self._backend)
        assert result.groups is not None
        output, lse = result.groups.output[SOURCES], result.groups.lse[SOURCES]
        mass = (lse - result.statistics["lse"]).exp()[..., None]
        if self._rule == "move":
            if call.sink_logits is not None:
                raise LensError(
                    "edit 'move' is not defined beside a learned sink, which holds mass of its own; "
                    "use 'drop' or 'mask'"
                )
            return torch.where(mass > 0, output, result.output).to(result.output.dtype)
        mean, known = _running_mean(call, source)
        rest = (result.groups.lse[REST] - result.statistics["lse"]).exp()[..., None]
        changed = rest * result.groups.output[REST] + mass * torch.where(known, mean, output)
        return changed.to(result.output.dtype)

    def _record(self, call: LayerCall) -> None:
        batch, _, queries, _ = call.query.shape
        keys = call.key.shape[2]
        at = KeysAt(call.layer, 0, torch.arange(keys, device=call.key.device)[None], None)
        assert self._sources is not None
        source = members("sources", self._sources, at)[0]
        chosen = self._heads[call.layer].to(source.device)[:, None]
        edited = chosen & source  # [heads, keys]
        found = _received(call, None)
        if self._rule == "drop":
            found = found * torch.where(edited, 1 - self._amount, 1.0)
        elif self._rule == "mask" and self._amount:
            weight = torch.where(edited, 1 - self._amount, 1.0)
            found = _received(call, weight.log().clamp(min=_HIDDEN))
        elif self._rule in ("move", "transfer") and self._amount and bool(source.any()):
            if self._rule == "transfer" and call.sink_logits is not None:
                raise LensError(
                    "edit 'transfer' is not watched beside a learned sink, which holds mass of its own; "
                    "use 'drop' or 'mask', or lens.edit"
                )
            left = edited if self._rule == "transfer" else chosen & ~source
            moved = _received(call, torch.where(left, _HIDDEN, 0.0))
            found = found + self._amount * (moved - found)
        self.received.append(found.cpu())
        self.visible.append(call.mask.visible(batch, queries, keys)[0].cpu())


def _received(call: LayerCall, extra: torch.Tensor | None) -> torch.Tensor:
    """[heads, keys]: attention that each key receives, with `extra` [heads, keys] on its logits."""
    mask = call.mask.for_kernel(call.query.shape[2])
    bias = call.position_bias
    if extra is not None:
        extra = extra[None, :, None]
        bias = extra if bias is None else bias + extra
    mask = mask if bias is None else replace(mask, bias=bias.to(call.query.dtype))
    return attend(call, mask=mask, statistics=("received",)).statistics["received"][0]


def _running_mean(call: LayerCall, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean value of the other keys up to each row [batch, heads, queries, value_dim], and where there is one."""
    other = (~source).to(torch.float64)[:, None, :, None]
    count = other.cumsum(2)
    mean = (call.value.double() * other).cumsum(2) / count.clamp(min=1)
    share = call.query.shape[1] // call.value.shape[1]
    return mean.float().repeat_interleave(share, 1), count > 0
