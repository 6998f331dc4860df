"""PASTA: post-hoc attention steering, the prompt outside the spans that matter is scaled down.

In the chosen heads `log alpha` is added to the logits of all keys of the prompt that are in no span, and
the row is normalised again; generated tokens are left as they are. With several spans the released code
adds `log alpha` once per *other* span: n spans get `(n - 1) log alpha`, the rest of the prompt
`n log alpha`. The preset "released" does that too; with one span the two are the same.

Zhang et al., "Tell Your Model Where to Attend", arXiv 2311.02262; released code QingruZhang/PASTA
(`scale_position="exclude"`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lens_kernels.redistribution import LogitBias
from lens_kernels.redistribution import redistribute as recombine

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits.base import AttentionEdit, grouped, part_of, selected_heads
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt
from lens.passes.sessions import listening

PRESETS = ("paper", "released")
_GENERATED, _OUTSIDE, _SPANS = range(3)


@contextmanager
def pasta(
    model: LoadedModel,
    spans: Sequence[tuple[int, int]],
    *,
    preset: str = "paper",
    alpha: float = 0.01,
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    backend: str = "auto",
) -> Iterator[PastaEdit]:
    """Steer attention to spans of the prompt in every forward pass inside the block.

    Args:
        model: as `lens.load` returns it.
        spans: (start, end) positions from the first real token, the end not included; the same in
            each prompt of a batch.
        preset: "paper" or "released"; they differ where there are several spans.
        alpha: factor, above 0, of what is not emphasised; 1 changes nothing.
        layers, heads: what is steered; the paper profiles heads first (`search_heads`).
        backend: of `lens_kernels`.

    Yields:
        `PastaEdit`, which counts what was done; its sources are the prompt outside the spans.

    Raises:
        LensError: an unknown preset, an alpha or spans that make no sense, or a cache that began
            outside the block.

    Reference:
        arXiv 2311.02262.

    Example:
        >>> with lens.edits.pasta(model, [(4, 9)], heads=["L3H5", "L4H0"]):
        ...     model.model.generate(ids, max_new_tokens=20)
    """
    if preset not in PRESETS:
        raise LensError(f"preset of PASTA must be one of {', '.join(PRESETS)}, got {preset!r}")
    if not 0 < alpha < math.inf:
        raise LensError(f"alpha of PASTA must be above 0, got {alpha}; hide keys with rule='mask'")
    ends = sorted((int(start), int(end)) for start, end in spans)
    if not ends or any(not 0 <= start < end for start, end in ends):
        raise LensError(f"spans must be (start, end) with 0 <= start < end, got {list(spans)}")
    if any(start < end for (_, end), (start, _) in itertools.pairwise(ends)):
        raise LensError(f"spans must not overlap, got {list(spans)}")
    count = len(ends) if preset == "released" else 1
    log = math.log(alpha)
    edit = PastaEdit(
        ends, (count * log, (count - 1) * log), selected_heads(model, layers, heads), backend
    )
    with listening(model, edit.on_layer, exclusive=True):
        yield edit


class PastaEdit(AttentionEdit):
    """See `AttentionEdit`."""

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

    def _groups(self, call: LayerCall, at: KeysAt) -> torch.Tensor:
        places = at.positions
        if call.query.shape[2] == call.key.shape[2]:
            self._prompt[at.layer] = places.amax(-1) + 1
        elif at.layer not in self._prompt or len(self._prompt[at.layer]) != len(places):
            raise LensError(
                f"the cache of layer {at.layer} began outside the block, so the end of its prompt is "
                "not known; start the generation inside"
            )
        in_span = torch.zeros_like(places, dtype=torch.bool)
        for start, end in self._spans:
            in_span |= (places >= start) & (places < end)
        in_prompt = places < self._prompt[at.layer][:, None]
        groups = torch.where(in_prompt, _OUTSIDE, _GENERATED)
        return torch.where(in_span & in_prompt, _SPANS, groups).int()
