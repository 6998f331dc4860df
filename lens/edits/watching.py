"""Where attention goes while an edit of keys acts: what each key receives after it."""

from __future__ import annotations

from dataclasses import replace

import torch

from lens.common.errors import LensError
from lens.edits._keyed import KeyedEdit
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt, members
from lens.traces.scores import FEWEST_VIEWERS

_HIDDEN = -60.0
"""Added to logits instead of -inf: a row that sees nothing else keeps its attention, as in an edit."""


class Watch:
    """Stands in the model's attention, for prompts in one pass each; lets an edit act, or none.

    Attributes:
        received: per layer [heads, keys], sum over the queries of the edited attention; NaN where the
            edit leaves it no softmax with fixed weights (`Move` to some of the others, chosen rows).
        visible: per layer [keys], number of queries that see each key.
    """

    def __init__(self, edit: KeyedEdit | None = None, *, record: bool = True) -> None:
        self.received: list[torch.Tensor] = []
        self.visible: list[torch.Tensor] = []
        self._edit, self._record = edit, record

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
        batch, _, queries, _ = call.query.shape
        keys = call.key.shape[2]
        if self._record:
            at = KeysAt(call.layer, 0, torch.arange(keys, device=call.key.device)[None], None)
            self.received.append(self._after(call, at).cpu())
            self.visible.append(call.mask.visible(batch, queries, keys)[0].cpu())
        return attend(call).output if self._edit is None else self._edit.on_layer(call)

    def alpha(self) -> torch.Tensor:
        """[layers, heads, keys]: `received / visible`, NaN as in `lens.sinks.detection.alphas.alpha_of`."""
        received, visible = torch.stack(self.received), torch.stack(self.visible)[:, None]
        fewest = torch.full_like(visible, FEWEST_VIEWERS)
        fewest[..., 0] = 1
        return torch.where(visible >= fewest, received / visible.clamp(min=1), torch.nan)

    def _after(self, call: LayerCall, at: KeysAt) -> torch.Tensor:
        """[heads, keys]: what each key receives once the edit has acted."""
        found = _received(call, None)
        if self._edit is None or self._edit.plan.amount == self._edit.plan.nothing:
            return found
        plan, heads = self._edit.plan, self._edit.heads[call.layer].to(found.device)[:, None]
        assert plan.keys is not None
        source = members("keys", plan.keys, at)[0]
        edited = heads & source
        weight = torch.where(edited, 1 - plan.amount, 1.0)
        match plan.rule:
            case "zero" | "mean":
                return found
            case "drop":
                return found * weight
            case "mask":
                return _received(call, weight.log().clamp(min=_HIDDEN))
            case "bias":
                return _received(call, torch.where(edited, max(plan.amount, _HIDDEN), 0.0))
            case "move" if call.sink_logits is None and self._to_all_others(source, at):
                if not bool(source.any()):
                    return found
                moved = _received(call, torch.where(edited, _HIDDEN, 0.0))
                return found + plan.amount * (moved - found)
        return found.masked_fill(heads, torch.nan)

    def _to_all_others(self, source: torch.Tensor, at: KeysAt) -> bool:
        assert self._edit is not None
        to = self._edit.plan.to
        return to is None or torch.equal(members("to", to, at)[0], ~source)


def _received(call: LayerCall, extra: torch.Tensor | None) -> torch.Tensor:
    """[heads, keys]: attention that each key receives, with `extra` [heads, keys] on its logits."""
    mask = call.mask.for_kernel(call.query.shape[2])
    bias = call.position_bias
    if extra is not None:
        extra = extra[None, :, None]
        bias = extra if bias is None else bias + extra
    mask = mask if bias is None else replace(mask, bias=bias.to(call.query.dtype))
    return attend(call, mask=mask, statistics=("received",)).statistics["received"][0]
