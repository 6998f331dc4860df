"""`lens.policies.train`: predictors that learn from the exact map of our kernel which blocks matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lens.common.choices import Count, Seed, check_choice, check_lists, is_number
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, check_block_size
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.passes.sessions import base, listening
from lens.policies.indexer import Indexer
from lens.policies.seer import Seer
from lens.policies.sparsifiner import Sparsifiner
from lens.policies.trained import Pooled, Trained, pooled

Kind = Literal["seer", "sparsifiner", "indexer"]
_KINDS: dict[str, type[Trained]] = {kind.kind: kind for kind in (Seer, Sparsifiner, Indexer)}
_SHARE = 0.25


def train(
    kind: Kind,
    model: LoadedModel,
    prompts: Any,
    *,
    layers: Sequence[int] | None = None,
    block_size: int | tuple[int, int] = 64,
    steps: Count = 300,
    rate: float = 0.01,
    seed: Seed = 0,
    progress: bool = True,
) -> Trained:
    """Train a predictor of the map of each head, with the model as it is.

    One dense pass over every prompt keeps pooled queries and keys and the exact masses and largest entries
    of the blocks, and nothing of size queries x keys; Adam then trains each layer by itself, one prompt a
    step. A share of 0.25 of the blocks is kept; `found.keeping(top=16)` is the same with another budget.

    Args:
        kind: "seer" (`Seer`), "sparsifiner" (`Sparsifiner`) or "indexer" (`Indexer`).
        model: as `lens.load` returns it.
        prompts: as those of `lens.capture`; what is measured later should be others.
        layers: by the model's own numbers; None: all.
        block_size: tokens, one number or (query_block, key_block).
        steps, rate: of Adam.
        seed: of the order of the prompts and of weights that are drawn.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown kind, no prompts, a layer without attention, numbers that are none.

    Example:
        >>> gate = lens.policies.train("seer", model, texts, block_size=4, steps=20, progress=False)
        >>> str(gate)
        'Seer(3 layers, share=0.25)'
    """
    maker = _KINDS[check_choice("kind", kind, Kind)]
    size = check_block_size(block_size)
    if not is_number(rate) or not 0 < rate < float("inf"):
        raise LensError(f"rate must be a number above 0, got {rate!r}")
    if layers is not None:
        check_lists(layers=layers)
    wanted = set(model.info.attending if layers is None else layers)
    for layer in wanted:
        model.info.head((layer, 0))
    if not wanted:
        raise LensError("no layers to train; give at least one, or leave layers out for all")
    read, _ = read_prompts(model, prompts)
    seen: dict[int, list[_Example]] = {layer: [] for layer in sorted(wanted)}
    with advancing(f"{model.name}: maps", len(read), progress) as advance:
        watcher = _Watcher(size, seen)
        for prompt in read:
            with torch.no_grad(), listening(model, watcher.on_layer):
                base(model)(**prompt.inputs)
            advance(1)
    weights, losses = {}, {}
    with advancing(f"{model.name}: {kind}", len(seen) * steps, progress) as advance:
        for layer, examples in seen.items():
            weights[layer], losses[layer] = _fit(maker, examples, steps, rate, seed + layer)
            advance(steps)
    return maker(weights, size, share=_SHARE, losses=losses)


def load_trained(path: str | Path) -> Trained:
    """A predictor that `save` wrote.

    Raises:
        LensError: no such file, or one that is none.

    Example:
        >>> gate = lens.policies.train("seer", model, texts, block_size=4, steps=1, progress=False)
        >>> gate.save("gate.safetensors")
        >>> str(lens.policies.load_trained("gate.safetensors"))
        'Seer(3 layers, share=0.25)'
    """
    weights: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            facts = dict(file.metadata())
            for key in file.keys():  # noqa: SIM118 - not a mapping
                layer, name = key.split("/")
                weights.setdefault(int(layer), {})[name] = file.get_tensor(key)
        maker = _KINDS[facts.pop("kind")]
        rows, columns = map(int, facts.pop("block_size").split())
        budget: dict[str, Any] = {
            name: int(one) if name == "top" else float(one) for name, one in facts.items()
        }
        return maker(weights, (rows, columns), **budget)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise LensError(f"{path} is no file of a trained policy: {said}") from None


@dataclass(frozen=True, eq=False)
class _Example:
    """One prompt in one layer."""

    seen: Pooled
    masses: Tensor
    peaks: Tensor


class _Watcher:
    def __init__(self, size: tuple[int, int], seen: dict[int, list[_Example]]) -> None:
        self._size, self._seen = size, seen

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        view = BlockView(call, *self._size)
        if call.layer not in self._seen:
            return view.attended().output
        found = view.attended(statistics=("block_mass", "block_max"))
        rows = view.visible.any(-1, keepdim=True)
        masses = torch.where(rows, found.statistics.block_mass, 0)
        self._seen[call.layer].append(_Example(pooled(view), masses, found.statistics.block_max))
        return found.output


def _fit(
    maker: type[Trained], examples: list[_Example], steps: int, rate: float, seed: int
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Trained weights and the loss of each step."""
    longest = max(examples, key=lambda one: one.seen.key.shape[2])
    start = maker.start(longest.seen, torch.Generator().manual_seed(seed))
    device = longest.masses.device
    weights = {name: one.to(device).requires_grad_() for name, one in start.items()}
    optimiser = torch.optim.Adam(list(weights.values()), lr=rate)
    order = np.random.default_rng(seed).integers(len(examples), size=steps)
    losses = np.empty(steps)
    for step, number in enumerate(order.tolist()):
        one = examples[number]
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            loss = maker.loss(maker.predicted(weights, one.seen), one.seen, one.masses, one.peaks)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        losses[step] = loss.item()
    return {name: one.detach().cpu() for name, one in weights.items()}, losses
