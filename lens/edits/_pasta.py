"""PASTA: post-hoc attention steering, the prompt outside the spans that matter is scaled down.

In the chosen heads `log alpha` is added to the logits of all keys of the prompt that are in no span, and
the row is normalised again; generated tokens are left as they are. With several spans the released code
adds `log alpha` once per *other* span: n spans get `(n - 1) log alpha`, the rest of the prompt
`n log alpha`. The preset "released" does that too; with one span the two are the same.

Zhang et al., "Tell Your Model Where to Attend", arXiv 2311.02262; released code QingruZhang/PASTA
(`scale_position="exclude"`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lens_kernels.redistribution import LogitBias
from lens_kernels.redistribution import redistribute as recombine

from lens.common.errors import LensError
from lens.edits.base import AttentionEdit, grouped, part_of
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt

_GENERATED, _OUTSIDE, _SPANS = range(3)


class PastaEdit(AttentionEdit):
    """See `AttentionEdit`."""

    word = "Pasta"

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        biases: tuple[float, float],
        heads: torch.Tensor,
        backend: str,
    ) -> None:
        super().__init__(heads, backend)
        self._spans, self._biases = spans, biases
        self._prompt: dict[int, torch.Tensor] = {}  # layer -> [batch], tokens of the prompt

    def _edit(self, call: LayerCall, at: KeysAt, heads: torch.Tensor) -> torch.Tensor | None:
        if self._biases == (0, 0):
            return None
        groups = self._groups(call, at)
        if call.query.shape[2] == call.key.shape[2]:
            self._check_spans(groups, self._prompt[at.layer])
        if not bool((groups == _OUTSIDE).any()):
            self.empty_calls += 1
            return None
        output = attend(call, backend=self._backend).output.clone()
        chosen = heads.nonzero()[:, 0]
        part = part_of(call, chosen)
        result = grouped(part, groups, self._backend)
        assert result.groups is not None
        biases = [0.0, *self._biases][: len(result.groups.lse)]
        edited = recombine(
            result.groups,
            LogitBias(biases),
            output=output[:, chosen],
            sink_logits=part.sink_logits,
        )
        before, after = edited.mass_before[_OUTSIDE], edited.mass[_OUTSIDE]
        self._count(before, after, edited.skipped, result.statistics["lse"] > -torch.inf)
        output[:, chosen] = edited.output
        return output

    def _check_spans(self, groups: torch.Tensor, lengths: torch.Tensor) -> None:
        """Raises LensError: a prompt that has nothing to emphasise, where all would be scaled down alike."""
        if (without := (groups != _SPANS).all(-1)).any():
            tokens = int(lengths[without.int().argmax()])
            raise LensError(
                f"spans of PASTA must begin within the prompt, which has {tokens} tokens; got {list(self._spans)}"
            )

    def _groups(self, call: LayerCall, at: KeysAt) -> torch.Tensor:
        places = at.positions
        if call.query.shape[2] == call.key.shape[2]:
            self._prompt[at.layer] = places.amax(-1) + 1
        else:
            self._check_follows(call, self._prompt, "the end of its prompt is")
        in_span = torch.zeros_like(places, dtype=torch.bool)
        for start, end in self._spans:
            in_span |= (places >= start) & (places < end)
        in_prompt = places < self._prompt[at.layer][:, None]
        groups = torch.where(in_prompt, _OUTSIDE, _GENERATED)
        return torch.where(in_span & in_prompt, _SPANS, groups).int()
