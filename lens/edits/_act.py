"""ACT: attention calibration, sink tokens after the first give most of their mass to all other keys.

A key `k` is a sink of a head where it receives `alpha_k > threshold` of the attention of the rows that
see it (Gu's measure). Its probabilities keep the fraction beta, the rest of its mass goes to all other
visible keys pro rata. The presets:

    ==============  =====================  ============================================
    item            paper                  released
    ==============  =====================  ============================================
    threshold       5 / N, N tokens        0.1
    left alone      the first token        the first sink that is found, whatever it is
    layers          all                    2 to the last but one (2 to 30 of 32)
    decoding        the prompt's sinks     not edited
    ==============  =====================  ============================================

The paper calibrates only heads that help on a validation set: see `search_heads`.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765; released code
GATECH-EIC/ACT.
"""

from __future__ import annotations

import torch
from lens_kernels.redistribution import Transfer
from lens_kernels.redistribution import redistribute as recombine

from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, grouped, part_of
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt

_REST, _SOURCES = range(2)


class ActEdit(AttentionEdit):
    """See `AttentionEdit`; rows that it looks at are those of heads with sinks."""

    word = "Act"

    def __init__(
        self, preset: str, beta: float, threshold: float | None, heads: torch.Tensor, backend: str
    ) -> None:
        super().__init__(heads, backend)
        self._released, self._beta, self._threshold = preset == "released", beta, threshold
        self._sinks: dict[int, torch.Tensor] = {}  # layer -> bool [batch, heads, positions]

    def _edit(self, call: LayerCall, at: KeysAt, heads: torch.Tensor) -> torch.Tensor | None:
        if not call.mask.causal and call.mask.allowed is None:  # an encoder, not a prefix
            raise LensError(f"layer {at.layer} sees later tokens; ACT is defined for causal models")
        if self._beta == 1:
            return None
        if call.query.shape[2] == call.key.shape[2]:
            self._sinks[at.layer] = self._found(call, at)
        else:
            self._check_follows(call, self._sinks, "the sinks of its prompt are")
            if self._released:
                return None
        sinks = self._at(self._sinks[at.layer], at.positions) & heads[:, None]
        with_sinks = sinks.any(-1).any(0).nonzero()[:, 0]
        if not len(with_sinks):
            self.empty_calls += 1
            return None
        output = attend(call, backend=self._backend).output.clone()
        calls = self.calls
        for head in with_sinks:  # sinks differ from head to head, key groups do not
            part = part_of(call, head[None])
            groups = torch.where(sinks[:, head], _SOURCES, _REST).int()
            result = grouped(part, groups, self._backend)
            assert result.groups is not None
            edited = recombine(
                result.groups,
                Transfer([_SOURCES], [_REST], 1 - self._beta),
                output=output[:, head[None]],
                sink_logits=part.sink_logits,
            )
            before, after = edited.mass_before[_SOURCES], edited.mass[_SOURCES]
            self._count(before, after, edited.skipped, result.statistics["lse"] > -torch.inf)
            output[:, head[None]] = edited.output
        self.calls = calls + 1
        return output

    def _found(self, call: LayerCall, at: KeysAt) -> torch.Tensor:
        """bool [batch, heads, positions]: the sinks of a prompt, by place from its first real token."""
        batch, _, queries, _ = call.query.shape
        found = attend(call, statistics=("received",), backend=self._backend)
        received = found.statistics["received"]
        visible = call.mask.visible(batch, queries, queries).to(received.device)
        alpha = received / visible.clamp(min=1)[:, None]
        tokens = (visible > 0).sum(-1)[:, None, None]
        threshold = self._threshold
        if threshold is None:
            threshold = 0.1 if self._released else 5 / tokens
        sinks = (alpha > threshold) & (visible > 0)[:, None]
        if self._released:
            sinks = sinks & (sinks.cumsum(-1) > 1)
        first = at.positions.eq(0).int().argmax(-1)
        places = torch.arange(queries, device=sinks.device) + first[:, None]
        inside = (places < queries)[:, None]
        places = places.clamp(max=queries - 1)[:, None].expand_as(sinks)
        sinks = sinks.gather(-1, places) & inside
        if not self._released:
            sinks[..., 0] = False
        return sinks

    @staticmethod
    def _at(sinks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """bool [batch, heads, keys] of the keys of a call."""
        inside = (positions >= 0) & (positions < sinks.shape[-1])
        places = positions.clamp(0, sinks.shape[-1] - 1)[:, None].expand(-1, sinks.shape[1], -1)
        return sinks.gather(-1, places) & inside[:, None]
