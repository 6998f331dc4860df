"""How much of a token's next state comes from other tokens: by weights, by sizes, and with residual stream and norm.

A layer gives token i `sum over j of u_ij`, with `u_ij = sum over heads of A_ij v_j W_O`; the residual stream adds x_i to
u_ii, and a norm behind it divides all parts by the size of the whole. The mixing ratio is

    |sum over j != i of u_ij| / (|sum over j != i of u_ij| + |u_ii|)

and needs no map: the sum over others is what the layer wrote less u_ii, for which the diagonal of the attention is enough.
Biases of the output belong to no token and are left out, as in the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import check_counts
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.models.parts import Layout
from lens.passes.calls import LayerCall, attend, evened, of_heads
from lens.passes.inputs import read_prompts
from lens.passes.replay import proved
from lens.passes.sessions import run
from lens.passes.visit import visiting
from lens.reading._head import Plain
from lens.reading._rows import capped
from lens.reading.mixtures import MEASURES, MixingRatios

_ROWS = 1024  # of a mask, looked at together


def mixing(
    model: LoadedModel, prompts: Any, *, seed: int = 0, progress: bool = True
) -> MixingRatios:
    """Mixing ratios of every layer: what other tokens bring of a token's next state, beside even attention.

    Args:
        model: as in `lens.reading.explain`.
        prompts: one or several, of any length.
        seed: of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: Kobayashi et al., Attention is Not Only a Weight, 2020, arXiv 2004.10102, and Incorporating Residual and
        Normalization Layers into Analysis of Masked Language Models, 2021, arXiv 2109.07152.

    Raises:
        LensError: prompts or a model that `explain` does not take.

    Example:
        >>> found = lens.reading.mixing(small, lens.tasks.copied(small, 12))
        >>> found.table()["measure"].unique().tolist()
        ['weights', 'norms', 'weights_residual', 'norms_residual']
    """
    check_counts(0, seed=seed)
    read, _ = read_prompts(model, prompts, whole=True)
    layout = proved(model)
    found: list[dict[int, tuple[Tensor, Tensor]]] = []
    with advancing(f"{model.name}: mixing", len(read), progress) as advance:
        for prompt in read:
            taking = _Mixing(layout)
            with torch.no_grad(), visiting(layout, 1, taking):
                run(layout.model, prompt.inputs)
            found.append(taking.ratios)
            advance(1)
    layers = sorted(found[0])
    own, even = (
        np.stack([[one[layer][place].numpy() for layer in layers] for one in found], -1)
        for place in (0, 1)
    )
    numbers = [model.info.attending[layer] for layer in layers]
    return MixingRatios(
        tuple(numbers), own.transpose(1, 0, 2), even.transpose(1, 0, 2), seed, model.name
    )


class _Mixing(Plain):
    """The pass in which every layer is measured: layer -> ratios [measures], and with even attention."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.ratios: dict[int, tuple[Tensor, Tensor]] = {}
        self._stream: Tensor | None = None

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps the stream that the layer adds to."""
        norm = self.layout.blocks[layer].norm
        self._stream = norm.forward(residual) if self.layout.normed else residual
        return super().project(layer, residual)

    def attention(self, layer: int, call: LayerCall) -> None:
        assert self._stream is not None
        stream = self._stream[0].double()
        blind = replace(evened(call), sink_logits=None)
        own, even = (self._ratios(layer, one, stream) for one in (call, blind))
        self.ratios[layer] = own, even

    def _ratios(self, layer: int, call: LayerCall, stream: Tensor) -> Tensor:
        """[measures], mean over tokens."""
        block = self.layout.blocks[layer]
        made = attend(call, statistics=("lse",))
        assert made.statistics.lse is not None
        lse = made.statistics.lse[0].double()  # [heads, tokens]
        key, value = (of_heads(call, one)[0].double() for one in (call.key, call.value))
        logits = call.scale * (call.query[0].double() * key).sum(-1)
        logits, tokens = capped(call, logits), key.shape[1]
        if call.position_bias is not None:
            bias = call.position_bias[0].expand(len(key), tokens, tokens)
            logits = logits + bias.diagonal(dim1=-2, dim2=-1).double()
        places = torch.arange(tokens, device=key.device).split(_ROWS)
        sees = [call.mask.seen_by(some, tokens).gather(-1, some[:, None])[:, 0] for some in places]
        diagonal = (logits - lse).exp() * torch.cat(sees)
        row = torch.ones_like(lse)
        if call.sink_logits is not None:
            row = row - (call.sink_logits.double()[:, None] - lse).exp()
        output = block.output.double()
        self_written = torch.einsum("ht,htk,hkd->td", diagonal, value, output)
        written = torch.einsum("htk,hkd->td", made.output[0].double(), output)
        added = written if block.output_bias is None else written + block.output_bias.double()
        size = block.after.size(added).double()
        mine, whole = (block.after.frozen(one, size) for one in (self_written, written))
        others, mine = whole - mine, mine + stream
        kept, rest = diagonal.mean(0), (row - diagonal).mean(0).clamp(min=0)
        found = [
            _ratio(rest, kept),
            _ratio((written - self_written).norm(dim=-1), self_written.norm(dim=-1)),
            _ratio(rest / 2, (kept + 1) / 2),
            _ratio(others.norm(dim=-1), mine.norm(dim=-1)),
        ]
        if self.layout.normed:
            norm = block.mlp_norm
            behind = norm.size(stream + added).double()
            found.append(_ratio(*(norm.frozen(one, behind).norm(dim=-1) for one in (others, mine))))
        else:
            found.append(torch.tensor(torch.nan))
        assert len(found) == len(MEASURES)
        return torch.stack([one.mean().cpu() for one in found])


def _ratio(others: Tensor, own: Tensor) -> Tensor:
    return others / (others + own).clamp(min=1e-300)
