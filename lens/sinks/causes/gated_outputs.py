"""Gates behind the attention, on the scale of the effective gate: what they leave of a head's output."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import nn

from lens.common.errors import LensError
from lens.edits.losses import bos_policy, two_tokens
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import read_prompts
from lens.passes.sessions import base, listening
from lens.sinks.causes.gates import EffectiveGates
from lens.stats import over_units

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""Last part of the names under which models keep the projection of their heads' outputs."""
_SAME = 1e-5


def output_gates(model: LoadedModel, prompts: Any, *, seed: int = 0) -> EffectiveGates:
    """`g = sum(o' . o) / sum(o . o)` of every head: o its output, o' what enters the projection.

    For one gate a head this is the gate itself, for gates by element (Qwen's gated attention, AFMoE:
    `o' = sigmoid(x W_g) * o`) their mean weighted by o². Means over rows, then prompts; mechanism
    "output". Such gates do a sink's work without a sink: with them the first token keeps 4.8 % of the
    attention instead of 46.7 % (Qiu et al. 2025, arXiv 2505.06708).

    Args:
        model: as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        seed: of the bootstrap.

    Raises:
        LensError: a model without such gates, or whose projection is not found.
    """
    model.info.check_all_attend("output_gates")
    found, read = [], []
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        watcher = _Watcher(model)
        with torch.no_grad(), listening(model, watcher.on_layer), watcher.hooked():
            base(model)(**prompt.inputs)
        found.append(watcher.gates())
        read.append(ids)
    values = torch.stack(found).double().numpy()  # [prompts, layers, heads]
    if (abs(values - 1) < _SAME).all():
        raise LensError(
            f"{model.name} has no output gates: what its heads compute enters the projection as it is; "
            "lens.sinks.effective_gate measures what its sinks leave"
        )
    low, high = over_units(values, (values == values).astype(float), seed)
    rows = [
        {
            "mechanism": "output",
            "layer": layer,
            "head": head,
            "gate": values[:, layer, head].mean(),
            "low": low[layer, head],
            "high": high[layer, head],
        }
        for layer in range(values.shape[1])
        for head in range(values.shape[2])
    ]
    return EffectiveGates(
        pd.DataFrame(rows), tuple(len(ids) for ids in read), bos_policy(model, read)
    )


class _Watcher:
    """Runs the model as it is; per layer [heads], from each output and what follows of it."""

    def __init__(self, model: LoadedModel) -> None:
        self._layers = 0
        self._model = model
        self._output: torch.Tensor | None = None  # [rows, queries, heads, dim] of the last call
        self._kept: list[torch.Tensor] = []

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        result = attend(call)
        output = result.output.to(call.value.dtype)
        self._output = output.transpose(1, 2)
        self._layers += 1
        return output

    def hooked(self) -> _Hooks:
        """Looks at what enters each output projection."""
        return _Hooks(self._model, self.meet)

    def meet(self, entering: torch.Tensor) -> None:
        """Compare what enters a projection with the attention that ran last."""
        output = self._output
        if output is None or entering.shape[-1] != output.shape[-1] * output.shape[-2]:
            return
        self._output = None
        gated = entering.reshape(output.shape).double()
        plain = output.double()
        norms = (plain * plain).sum(-1)
        shares = ((gated * plain).sum(-1) / norms.clamp_min(1e-30)).where(norms > 0, torch.nan)
        self._kept.append(shares[0].nanmean(0).cpu())

    def gates(self) -> torch.Tensor:
        """[layers, heads].

        Raises:
            LensError: a projection was not seen.
        """
        if len(self._kept) != self._layers or not self._kept:
            raise LensError(
                f"{self._model.name} has {self._layers} attention layers, and behind {len(self._kept)} of "
                f"them a projection was found; known names: {', '.join(PROJECTIONS)}"
            )
        return torch.stack(self._kept)


class _Hooks:
    """Hooks on all output projections, while a block runs."""

    def __init__(self, model: LoadedModel, meet: Any) -> None:
        self._parts = [
            part
            for name, part in base(model).named_modules()
            if name.rpartition(".")[2] in PROJECTIONS and not list(part.children())
        ]
        self._meet = meet
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._meet(inputs[0])

        self._handles = [part.register_forward_pre_hook(before) for part in self._parts]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
