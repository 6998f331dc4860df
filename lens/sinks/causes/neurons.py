"""Super neurons: whether one neuron makes most of what an MLP writes at the sources of a sink.

    share of neuron n = |a_n| |W_n| / sum over m of |a_m| |W_m|,   a what the last projection W of the MLP reads

Reference: a sink's state comes from few MLP neurons that write through few channels, 2026, arXiv 2605.06611.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lens import stats
from lens.models.layout import is_known
from lens.models.loaded import LoadedModel
from lens.models.parts import Block
from lens.models.weights import matrix
from lens.passes.inputs import Prompt
from lens.passes.replay import proved
from lens.passes.sessions import base
from lens.stats.intervals import columns, known_mean

_NAMES = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "dense", "lin2")


def neurons_of(
    model: LoadedModel, prompts: Sequence[Prompt], sources: Sequence[Tensor], *, seed: int
) -> dict[str, np.ndarray]:
    """Columns, one number per layer: `neuron`, the one whose share at the sources is largest over the prompts; `neuron_share`
    of it there, with `_low`, `_high` over prompts; `neuron_share_others`, of whichever is largest at each other position (median);
    `channels`, (sum w²)² / sum w⁴ of its weights: how many dimensions it writes through. NaN where MLPs are not in the
    table, or have experts."""
    layers = list(model.info.attending)
    blocks = proved(model).blocks if is_known(model) else ()
    lasts = {
        layer: found for layer, block in enumerate(blocks) if (found := _last(block)) is not None
    }
    others = np.full((len(layers), len(prompts)), np.nan)
    at_sources: dict[int, dict[int, np.ndarray]] = {layer: {} for layer in layers}
    sizes = {layer: _weights(model, part).norm(dim=1) for layer, part in lasts.items()}
    for number, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        for layer, read in _read(model, prompt, lasts).items():
            if len(read) != len(source):  # experts take some of the tokens
                continue
            written = read.double().abs() * sizes[layer]
            own = written / written.sum(-1, keepdim=True).clamp_min(1e-30)
            most = own.amax(-1).cpu()
            others[layers.index(layer), number] = stats.quantile(most[~source].numpy(), 0.5)
            at_sources[layer][number] = own[source.to(own.device)].mean(0).cpu().numpy()
    shares = np.full_like(others, np.nan)
    neuron, channels = np.full((2, len(layers)), np.nan)
    for place, (layer, found) in enumerate(at_sources.items()):
        if not found:
            continue
        of_neurons = np.stack(list(found.values()))  # [prompts, neurons]
        best = int(of_neurons.mean(0).argmax())
        shares[place, list(found)], neuron[place] = of_neurons[:, best], best
        square = _weights(model, lasts[layer], best).square()
        channels[place] = float(square.sum() ** 2 / square.square().sum())
    return {
        **columns("neuron_share", shares, seed, known=True),
        "neuron_share_others": known_mean(others),
        "neuron": neuron,
        "channels": channels,
    }


def _weights(model: LoadedModel, part: nn.Module, neuron: int | slice = slice(None)) -> Tensor:
    """[neurons, d_model] of the last projection of an MLP, or [d_model] of one neuron."""
    return matrix(part, model)[0][neuron].double()


def _last(block: Block) -> nn.Module | None:
    """The one projection that an MLP ends with."""
    found = [
        part
        for mlp in block.mlp
        for name, part in mlp.named_modules()
        if name.rpartition(".")[2] in _NAMES or (not name and part is block.mlp[-1])
    ]
    plain = [part for part in found if isinstance(getattr(part, "weight", None), Tensor)]
    return plain[0] if len(plain) == 1 else None


def _read(model: LoadedModel, prompt: Prompt, lasts: dict[int, nn.Module]) -> dict[int, Tensor]:
    """Layer -> [tokens, neurons] that its last projection reads."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[layer] = arguments[0].detach().flatten(0, -2)

    with ExitStack() as stack, torch.no_grad():
        for layer, part in lasts.items():
            stack.callback(part.register_forward_pre_hook(partial(keep, layer)).remove)
        base(model)(**prompt.inputs)
    return found
