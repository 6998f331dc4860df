"""The causal test of each kind of sink: its heads without the sources' value, without the sources, with others' values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.edits._others import by_layer, keys_of_mass
from lens.edits.attention import Drop, Mask, Value
from lens.edits.clean_runs import CleanRuns
from lens.edits.effects import effect
from lens.edits.losses import changes_of, predictions
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.inputs import Prompt
from lens.passes.keys import Keys
from lens.sinks.causes.gates import Outputs
from lens.stats.controls import drawing
from lens.stats.intervals import columns

ON_KEYS = ("nop", "fixed broadcast", "input broadcast", "broadcast", "mixed")
"""Kinds of sinks that are keys; the others have no value to take."""
OF_MODEL = {"learned": "without", "gate": "open"}
"""Kinds that the model has of itself -> their test."""


def tests_of(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    places: Sequence[Tensor],
    values: Sequence[Mapping[int, Tensor]],
    rows: pd.DataFrame,
    *,
    sources: Keys,
    draws: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """A row per kind that heads have, and test; all heads of the kind together.

    `test`: "zero" (the sources' values become 0), "mask" (their attention goes to the other keys), "mean" (their
    values become the mean over the prompts) and "other" (those of another prompt). `delta_loss` with `_low`, `_high`,
    nats a token; `control` the same of random keys with as much attention, `excess` over it with `_low`, `_high`
    (not of "mean" and "other"); `mass`, `control_mass`. Of sinks that the model has of itself "without" (a learned sink takes
    nothing) and "open" (the gate lets all through): `mass` is what these take, and the random keys that hold as much in the
    same heads are hidden where a learned sink is taken away, and left out where a gate is opened; where keys hold less than that, it is
    all but the sources and `control_mass` says so.

    Args:
        model, prompts, draws, seed, progress: as of `kinds`.
        places: of each prompt bool [tokens], the sources.
        values: of each prompt layer -> [groups, sources, dim], what these hold.
        rows: with the `kind` of each head.
        sources: as `kinds` was given them.
    """
    found = []
    present = [kind for kind in ON_KEYS if bool((rows["kind"] == kind).any())]
    read = [prompt.inputs["input_ids"][0] for prompt in prompts]
    clean = CleanRuns(model)
    with advancing("tests of sinks", len(present), progress) as advance:
        for kind in present:
            own = rows[rows["kind"] == kind]
            heads = _heads(own)
            said = {"kind": kind, "heads": len(heads)}
            for test, edit in (("zero", Value), ("mask", Mask)):
                done = effect(
                    model, read, edit(sources, heads=heads), controls="mass", draws=draws, seed=seed,
                    clean=clean, progress=False,
                )  # fmt: skip
                table = done.table().set_index("condition").reindex(["edit", "mass"])
                names = [f"delta_loss{end}" for end in ("", "_low", "_high")]
                row = said | {"test": test, "mass": table.loc["edit", "mass"]}
                row |= {name: table.loc["edit", name] for name in names}
                row |= {"control": table.loc["mass", "delta_loss"]}
                row |= {
                    f"excess{end}": table.loc["mass", f"excess{end}"]
                    for end in ("", "_low", "_high")
                }
                found.append(row | {"control_mass": table.loc["mass", "mass"]})
            for test, instead in _instead(values):
                changed = [
                    _change(model, prompt, place, heads, new, clean)
                    for prompt, place, new in zip(prompts, places, instead, strict=True)
                ]
                row = said | {"test": test, "mass": found[-1]["mass"]}
                cells = columns("delta_loss", np.array([changed]), seed, shares=False)
                found.append(row | {name: float(cell[0]) for name, cell in cells.items()})
            advance(1)
    for kind, test in OF_MODEL.items():
        own = rows[rows["kind"] == kind]
        if len(own):
            heads = _heads(own)
            changed = np.array([_of_model(model, prompt, heads, kind, clean) for prompt in prompts])
            taken = own["learned"] if kind == "learned" else 1 - own["gate"]
            control, mass = _random_keys(
                model, read, places, own.assign(taken=taken), kind, clean, draws, seed
            )
            row = {"kind": kind, "heads": len(heads), "test": test, "mass": taken.mean()}
            row |= {"control": control.mean(), "control_mass": mass}
            for name, each in (("delta_loss", changed), ("excess", changed - control)):
                cells = columns(name, each[None], seed)
                row |= {column: float(cell[0]) for column, cell in cells.items()}
            found.append(row)
    names = ["kind", "heads", "test", "mass", "delta_loss", "delta_loss_low", "delta_loss_high"]
    names += ["control", "excess", "excess_low", "excess_high", "control_mass"]
    return pd.DataFrame(found, columns=names)


def _heads(rows: pd.DataFrame) -> list[HeadId]:
    return [HeadId(int(a), int(b)) for a, b in rows[["layer", "head"]].to_numpy()]


def _instead(
    values: Sequence[Mapping[int, Tensor]],
) -> list[tuple[str, list[Mapping[int, Tensor]]]]:
    """Test -> of each prompt what its sources' values become; none of one prompt, whose mean they are."""
    if len(values) < 2:
        return []
    mean = {layer: torch.stack([one[layer] for one in values]).mean(0) for layer in values[0]}
    return [("mean", [mean] * len(values)), ("other", [*values[1:], values[0]])]


def _change(
    model: LoadedModel,
    prompt: Prompt,
    place: Tensor,
    heads: Sequence[HeadId],
    instead: Mapping[int, Tensor],
    clean: CleanRuns,
) -> float:
    """Change of the loss with other values of the sources in these heads."""

    def on_layer(call: LayerCall) -> Any:
        own = [head for layer, head in heads if layer == call.layer]
        if own:
            key, value = (of_heads(call, part) for part in (call.key, call.value))
            new = of_heads(call, instead[call.layer][None])[0].to(value)
            source = place.to(value.device)
            for head in own:
                value[:, head, source] = new[head]
            call = replace(call, key=key, value=value)
        return attend(call, statistics=()).output

    return _against(clean, prompt, predictions(model, prompt, on_layer))


def _of_model(
    model: LoadedModel, prompt: Prompt, heads: Sequence[HeadId], kind: str, clean: CleanRuns
) -> float:
    """Change of the loss when these heads' learned sinks take nothing, or their gates let all through."""

    def on_layer(call: LayerCall) -> Tensor:
        own = [head for layer, head in heads if layer == call.layer and kind == "learned"]
        if own and call.sink_logits is not None:
            sinks = call.sink_logits.clone()
            sinks[own] = -torch.inf
            call = replace(call, sink_logits=sinks)
        return attend(call, statistics=()).output

    outputs = Outputs(model, heads if kind == "gate" else ())
    with outputs.hooked():
        return _against(clean, prompt, predictions(model, prompt, outputs.of(on_layer)))


def _random_keys(
    model: LoadedModel,
    read: Sequence[Tensor],
    places: Sequence[Tensor],
    rows: pd.DataFrame,
    kind: str,
    clean: CleanRuns,
    draws: int,
    seed: int,
) -> tuple[np.ndarray, float]:
    """[prompts] change of the loss when random keys that hold what is `taken` are hidden, or left out; and what they held."""
    source = {tuple(ids.tolist()): place for ids, place in zip(read, places, strict=True)}
    heads = _heads(rows)

    def edit(number: int, prompt: Prompt) -> Mask | Drop:
        before, place = clean.of(prompt), source[tuple(prompt.ids or ())].cpu()
        keys = torch.zeros(model.info.layers, len(place), dtype=torch.bool)
        for layer, own in rows.groupby("layer"):
            here = before.received[int(layer)][own["head"].tolist()].mean(0).double()  # pyright: ignore[reportArgumentType]
            random = drawing(seed, number, int(layer), prompt.inputs_sha256)  # pyright: ignore[reportArgumentType]
            drawn = random.permutation(np.flatnonzero(~place.numpy()))
            held = (here / before.queries).cpu().numpy()
            keys[int(layer), keys_of_mass(drawn, held, own["taken"].mean())] = True  # pyright: ignore[reportArgumentType]
        return (Mask if kind == "learned" else Drop)(by_layer(keys), heads=heads)

    done = [
        effect(model, read, partial(edit, number), controls=(), clean=clean, progress=False)
        for number in range(draws)
    ]
    changed = np.mean([one.values["edit"]["delta_loss"][-1] for one in done], axis=0)
    return changed, float(np.mean([one.table()["mass"].iloc[0] for one in done]))


def _against(clean: CleanRuns, prompt: Prompt, after: Tensor) -> float:
    target = prompt.inputs["input_ids"][0, 1:].to(after.device)
    return changes_of(clean.of(prompt).predictions[:-1], after[:-1], target)[0]
