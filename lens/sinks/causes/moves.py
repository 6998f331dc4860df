"""What moves a sink: its state, or the massive part of it, put at another position; a position that sees itself alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import check_counts, check_lists
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.edits.clean_runs import CleanRun, CleanRuns, of_layers
from lens.edits.losses import predictions
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, of_heads
from lens.passes.inputs import Prompt
from lens.passes.residual import changed
from lens.sinks.activations.massive import massive
from lens.stats.controls import drawing
from lens.stats.intervals import columns
from lens.traces.scores import FEWEST_VIEWERS, SINK_EPSILON

WAYS = ("state", "massive", "alone", "other state", "other dimensions")
"""What is done: the last two are controls."""
_TARGET = 20


def moves_of(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    sources: Sequence[Tensor],
    table: pd.DataFrame,
    *,
    targets: Sequence[int] | None,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """A row per way and target: alpha before and after, in the heads behind `layer` that the sources are sinks of.

    `way`: "state", source and target swap what leaves `layer` (the one before the first sink; -1: what enters layer 0); "massive", they swap the
    massive dimensions alone; "alone", the target sees nothing but itself in any layer, so that it averages nothing;
    "other state" and "other dimensions" are controls of the first two: the target swaps with a position that is no
    source, and as many other dimensions are swapped. `source_before`, `source_after`, `target_before`, `target_after`:
    mean alpha over these heads, the last with `_low`, `_high`; `sinks_after`: share of them whose target is a sink.
    No row where no head with a sink is behind `layer`, no "massive" where there are no massive activations, and no "other
    state" where prompts have no other position that 16 queries see.

    Raises:
        LensError: a target that is a source, or that fewer than 16 queries see.
    """
    targets = _targets(sources) if targets is None else _checked(targets, sources)
    parked = table[table["mass"] > SINK_EPSILON]
    if parked.empty or not targets:
        return pd.DataFrame(columns=["way", "target", "layer"])
    heads = torch.zeros(model.info.layers, model.info.heads, dtype=torch.bool)
    for place in parked[["layer", "head"]].to_numpy().tolist():
        heads[tuple(place)] = True
    layer = int(parked["layer"].min()) - 1
    read = [prompt.inputs["input_ids"][0] for prompt in prompts]
    large = massive(model, read, progress=False)
    dims = large.dimensions
    emerged = layer if large.layer is None else large.layer
    found: dict[tuple[str, int, int], list[np.ndarray]] = {}
    with advancing("moving sinks", len(prompts), progress) as advance:
        for prompt, source in zip(prompts, sources, strict=True):
            runs = CleanRuns(model)
            before = runs.of(prompt)
            place = int(source.nonzero()[0])
            for target in targets:
                random = drawing(seed, target, prompt.inputs_sha256)
                free = (~source).nonzero()[:, 0]
                others = free[(free != target) & (free < len(source) - FEWEST_VIEWERS)].numpy()
                ways: list[tuple[str, int, Any]] = [("state", layer, _swapped(place, target, None))]
                if len(others):
                    other = int(random.choice(others))
                    ways.append(("other state", layer, _swapped(other, target, None)))
                if dims:
                    ways += [
                        ("massive", emerged, _swapped(place, target, dims)),
                        ("other dimensions", emerged, _swapped(place, target, dims, random)),
                    ]
                for way, at, change in ways:
                    behind = heads.clone()
                    behind[: at + 1] = False
                    if not behind.any():
                        continue
                    with changed(model, at, change):
                        after = runs.run(prompt)
                    found.setdefault((way, target, at), []).append(
                        _alphas(before, after.alpha, behind, place, target)
                    )
                rows = torch.arange(len(source)) != target
                after = _alone(model, prompt, target, rows)
                found.setdefault(("alone", target, -1), []).append(
                    _alphas(runs.run(prompt, rows), after, heads, place, target)
                )
            advance(1)
    moved = []
    for (way, target, at), values in found.items():
        several = np.stack(values, -1)  # [5, prompts]
        names = ("source_before", "source_after", "target_before")
        row = {"way": way, "target": target, "layer": at}
        row |= dict(zip(names, several.mean(-1)[:3], strict=True))
        row |= {
            name: float(cell[0])
            for name, cell in columns("target_after", several[3:4], seed).items()
        }
        moved.append(row | {"sinks_after": several[4].mean(), "heads": int(heads[at + 1 :].sum())})
    order = sorted(moved, key=lambda row: (row["target"], WAYS.index(row["way"])))
    return pd.DataFrame(order)


def _targets(sources: Sequence[Tensor]) -> list[int]:
    """20, or the last position before that enough queries see; none where the sources reach that far."""
    target = min(_TARGET, min(map(len, sources)) - FEWEST_VIEWERS - 1)
    return [target] if all(target > int(source.nonzero()[-1]) for source in sources) else []


def _checked(targets: Sequence[int], sources: Sequence[Tensor]) -> Sequence[int]:
    """Raises: LensError: a target that is a source, or that too few queries see."""
    check_lists(targets=targets)
    check_counts(1, **{f"targets[{place}]": one for place, one in enumerate(targets)})
    shortest = min(map(len, sources))
    for target in targets:
        if target >= shortest - FEWEST_VIEWERS or any(bool(source[target]) for source in sources):
            raise LensError(
                f"targets must be no sources and be seen by {FEWEST_VIEWERS} queries; the shortest prompt has "
                f"{shortest} tokens, got {target}"
            )
    return targets


def _swapped(
    one: int, other: int, dims: Sequence[int] | None, random: np.random.Generator | None = None
) -> Callable[[Tensor], Tensor]:
    """Two positions swap their states, or some dimensions of them; `random`: as many others."""

    def change(hidden: Tensor) -> Tensor:
        chosen = np.arange(hidden.shape[-1]) if dims is None else np.array(dims)
        if random is not None:
            free = np.setdiff1d(np.arange(hidden.shape[-1]), chosen)
            chosen = random.choice(free, len(chosen), replace=False)
        swapped = hidden.clone()
        swapped[:, one, chosen] = hidden[:, other, chosen]
        swapped[:, other, chosen] = hidden[:, one, chosen]
        return swapped

    return change


def _alone(model: LoadedModel, prompt: Prompt, target: int, rows: Tensor) -> Tensor:
    """[layers, heads, keys], alpha over some rows, with a target that sees nothing but itself."""
    watch = Watch(rows=rows)

    def on_layer(call: LayerCall) -> Tensor:
        output = watch.on_layer(call).clone()
        output[:, :, target] = of_heads(call, call.value[:, :, target])
        return output

    predictions(model, prompt, on_layer, parts=True)
    return of_layers(model, watch.alpha())


def _alphas(before: CleanRun, after: Tensor, heads: Tensor, source: int, target: int) -> np.ndarray:
    """[5]: alpha of source and of target, before and after, and how often the target is a sink after."""
    own, new = before.alpha[heads].double(), after[heads].double()
    ends = [own[:, source], new[:, source], own[:, target], new[:, target]]
    return np.array(
        [*(float(one.mean()) for one in ends), float((ends[3] > SINK_EPSILON).double().mean())]
    )
