"""Where sinks come from: how large, how varied and how steep the sources are in each layer, beside other positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens import stats
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt
from lens.passes.logits import logits_of
from lens.passes.residual import layer_inputs
from lens.passes.sessions import listening
from lens.sinks.causes.neurons import neurons_of
from lens.stats.intervals import columns

_MEASURES = ("norm", "variance", "gradient", "value_gradient")


def origins_of(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    sources: Sequence[Tensor],
    rows: pd.DataFrame,
    *,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """A row per layer: mean over the sources, over the median of the other positions.

    `norm`: of what enters the layer (massive activations). `variance`: over the dimensions of what all heads give at
    the position: averaging makes it smaller, and the first position averages nothing. `gradient`: size of the loss's
    gradient by what enters the layer; `value_gradient`: by the position's values, `sum_i A_ij dl/do_i`. Each with
    `_low`, `_high`; `mass`: mean over the layer's heads; and the columns of `lens.sinks.causes.neurons`.
    """
    found = []
    with advancing("origin of sinks", len(prompts), progress) as advance:
        for prompt, source in zip(prompts, sources, strict=True):
            found.append(_measured(model, prompt, source))
            advance(1)
    measured = np.stack(found, -1)  # [measure, layers, prompts]
    layers = list(model.info.attending)
    table = {"layer": layers}
    for name, values in zip(_MEASURES, measured, strict=True):
        table |= columns(name, values, seed, shares=False)
    table |= neurons_of(model, prompts, sources, seed=seed)
    table["mass"] = rows.groupby("layer")["mass"].mean().loc[layers].to_numpy()
    return pd.DataFrame(table)


def _measured(model: LoadedModel, prompt: Prompt, source: Tensor) -> np.ndarray:
    """[measure, attending layers] of one prompt."""
    hidden: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    given: dict[int, Tensor] = {}

    def enter(layer: int, states: Tensor) -> None:
        if not states.requires_grad:
            states.requires_grad_()
        hidden[layer] = states

    def on_layer(call: LayerCall) -> Tensor:
        output = attend(call, statistics=()).output
        values[call.layer], given[call.layer] = call.value, output.detach()
        return output

    ids = prompt.inputs["input_ids"]
    with torch.enable_grad(), listening(model, on_layer), layer_inputs(model, enter):
        logits = logits_of(model, ids)[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device))
    order = list(values)
    wanted = [hidden[layer] for layer in order] + [values[layer] for layer in order]
    slopes = torch.autograd.grad(loss, wanted)
    of_hidden, of_values = slopes[: len(order)], slopes[len(order) :]
    found = [
        [
            _ratio(hidden[layer][0].detach().norm(dim=-1), source),
            _ratio(given[layer][0].transpose(0, 1).flatten(1).double().var(-1), source),
            _ratio(slope[0].norm(dim=-1), source),
            _ratio(by_value[0].transpose(0, 1).flatten(1).norm(dim=-1), source),
        ]
        for layer, slope, by_value in zip(order, of_hidden, of_values, strict=True)
    ]
    return np.array(found).T


def _ratio(sizes: Tensor, source: Tensor) -> float:
    """Mean over the sources, over the median of the other positions but the last, which nothing follows."""
    others = ~source
    others[-1] = False
    sizes = sizes.double().cpu()
    middle = float(stats.quantile(sizes[others].numpy(), 0.5))
    return float(sizes[source].mean()) / middle if middle else float("nan")
