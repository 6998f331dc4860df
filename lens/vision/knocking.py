"""Knock-out of edges from text to image tokens: does the text miss its visual sinks?

In the rows of text after the image, and nowhere else, the edges to the visual sinks of each layer are
hidden and the rest is normalised again; then as many edges to other image tokens instead (E7 of the
protocol of causal tests). Sinks are image tokens with `phi >= tau` in what enters the layer.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv
2503.03321, figure 3b: without its visual sinks the model hardly changes, without as many random image
tokens it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.results import Result, described
from lens.edits.base import selected_heads
from lens.edits.controls import control_keys
from lens.edits.side_effects import MEASURES, changes_of, log_probabilities, scored_tokens
from lens.edits.sink_dims import check_dims, phi
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.sessions import listening
from lens.passes.stream import layer_inputs
from lens.stats import over_units
from lens.traces.segments import IMAGE, SYSTEM, TEXT, segments
from lens.vision.text_rows import TextRows

CONTROLS = ("size", "mass", "position")
PLACES = ("sinks", "image", "system", "text")


@dataclass(frozen=True, eq=False)
class KnockOut(Result):
    """Predictions of text with edges to image tokens hidden.

    Attributes:
        values: condition ("sinks" or a control) -> measure -> [prompts]: `delta_loss` (nats per token),
            `kl`, `flip_rate` over text predicted by the edited rows; `keys`, hidden per layer; `mass`,
            share of these rows' attention that the hidden keys had.
        places: condition, or "before" -> [prompts, 4], share of these rows' attention on the visual
            sinks, other image tokens, tokens before the image, text: where the mass has gone.
        tokens: [prompts], number of predictions.
        model: its name.
        seed: of controls and bootstrap.
    """

    values: dict[str, dict[str, np.ndarray]] = field(repr=False)
    places: dict[str, np.ndarray] = field(repr=False)
    tokens: tuple[int, ...]
    model: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per condition: means over prompts with 95 % bootstrap intervals.

        `excess` is the sinks' `delta_loss` minus the control's on the same prompts, NaN for "sinks";
        `on_...` are the shares of `places` after the edit.
        """
        rows = []
        for condition, found in self.values.items():
            row: dict[str, Any] = {
                "condition": condition,
                "keys": found["keys"].mean(),
                "mass": found["mass"].mean(),
            }
            excess = self.values["sinks"]["delta_loss"] - found["delta_loss"]
            measures = {name: found[name] for name in MEASURES}
            measures["excess"] = np.full_like(excess, np.nan) if condition == "sinks" else excess
            for name, values in measures.items():
                low, high = over_units(values, np.ones(len(values)), self.seed)
                row |= {name: values.mean(), f"{name}_low": float(low), f"{name}_high": float(high)}
            shares = self.places[condition].mean(0)
            row |= {f"on_{name}": share for name, share in zip(PLACES, shares, strict=True)}
            rows.append(row | {"n": len(self.tokens)})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[str, ...]:
        """What the text misses, in plain words."""
        sinks, *rows = self.table().to_dict("records")
        found = [
            f"Without the edges from text to its visual sinks ({sinks['keys']:.1f} keys per layer, "
            f"{sinks['mass']:.1%} of the text's attention) {self.model} changes its loss by "
            f"{_interval(sinks, 'delta_loss')} nats per token on {len(self.tokens)} prompts."
        ]
        for row in rows:
            low, high = row["excess_low"], row["excess_high"]
            judged = (
                "one prompt has no interval"
                if np.isnan(low)
                else "more than these"
                if low > 0
                else "less than these"
                if high < 0
                else "the interval holds 0"
            )
            found.append(
                f"Other image tokens ({row['condition']}-matched, {row['mass']:.1%} of the attention): "
                f"{_interval(row, 'delta_loss')}; the sinks cost {_interval(row, 'excess')} more: {judged}."
            )
        before, after = self.places["before"].mean(0), self.places["sinks"].mean(0)
        gained = (after - before)[1:]
        found.append(
            f"The attention taken from the sinks went most to {_WORDS[int(gained.argmax())]} "
            f"({gained.max():+.1%}), so that a small effect alone does not prove them irrelevant."
        )
        return tuple(found)


_WORDS = ("other image tokens", "tokens before the image", "the text")


def _interval(row: dict[Any, Any], name: str) -> str:
    return f"{row[name]:+.4f} [{row[f'{name}_low']:+.4f}, {row[f'{name}_high']:+.4f}]"


def knock_out(
    model: LoadedModel,
    prompts: Any,
    *,
    dims: Sequence[int] | None = None,
    tau: float = 20.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
) -> KnockOut:
    """Hide the edges from text to its visual sinks, and to as many other image tokens.

    Args:
        model: a vision-language model.
        prompts: one prompt of its processor, or a list of these.
        dims: sink dimensions, from `find_sink_dims` or `KNOWN`; None: all are looked at.
        tau: bound of phi.
        layers, heads: what is edited, as in `lens.edits.Mask`.
        controls: some of "size" (as many random image tokens), "mass" (random ones, added until their
            attention comes nearest to the sinks') and "position" (as many, the nearest in the prompt).
        seed: of controls and bootstrap.

    Raises:
        LensError: a prompt without images, sinks in no layer, fewer other image tokens than sinks, an
            unknown control, no head, or dims and layers that the model has not.

    Reference:
        arXiv 2503.03321, figure 3b.

    Example:
        >>> found = lens.vision.knock_out(vlm, inputs, dims=(3, 7), tau=2)
        >>> found.table()[["condition", "mass", "delta_loss", "excess_low", "excess_high"]]
    """
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise LensError(f"controls must be some of {', '.join(CONTROLS)}, got {unknown}")
    chosen = selected_heads(model, layers, heads)
    if not bool(chosen.any()):
        raise LensError("knock_out edits at least one head; layers and heads are empty")
    check_dims(model, dims)
    random = np.random.default_rng(seed)
    conditions = ("sinks", *controls)
    values = {name: {key: [] for key in (*MEASURES, "keys", "mass")} for name in conditions}
    places = {name: [] for name in ("before", *conditions)}
    tokens = []
    for prompt in read_prompts(model, prompts, with_images=True)[0]:
        if "pixel_values" not in prompt.inputs:
            raise LensError(
                "knock_out needs prompts with images: pass what a vision-language processor returns"
            )
        kind = segments(model, prompt.inputs, grid=()).kind[0]
        runs = _runs(kind == TEXT)
        target, scored = scored_tokens(model, prompt)
        scored = scored & (kind[:-1] == TEXT).to(scored.device)
        if not bool(scored.any()):
            raise LensError("knock_out measures text after the image; a prompt has none to predict")
        before, phis = TextRows(runs, None, chosen), {}
        base = _run(model, prompt, before, phis, dims)
        sinks = [
            (phis[layer] >= tau) & (kind == IMAGE) & bool(chosen[layer].any())
            for layer in range(len(chosen))
        ]
        if not any(bool(found.any()) for found in sinks):
            largest = max(float(size[kind == IMAGE].max()) for size in phis.values())
            raise LensError(
                f"no image token is a sink: phi reaches {largest:.1f}, tau is {tau:g}; lower tau or look "
                "for other dims (lens.edits.find_sink_dims)"
            )
        places["before"].append(_shares(before, kind, sinks))
        for condition in conditions:
            hidden = sinks
            if condition != "sinks":
                hidden = [
                    _control(condition, found, kind, before.received.get(layer), random)
                    for layer, found in enumerate(sinks)
                ]
            edit = TextRows(runs, hidden, chosen)
            edited = _run(model, prompt, edit, {}, dims)
            changed = changes_of(base[scored], edited[scored], target[scored])
            for name, value in zip(MEASURES, changed, strict=True):
                values[condition][name].append(value)
            used = [int(hidden[layer].sum()) for layer in before.received]
            values[condition]["keys"].append(np.mean(used))
            values[condition]["mass"].append(_mass(before, hidden))
            places[condition].append(_shares(edit, kind, sinks))
        tokens.append(int(scored.sum()))
    return KnockOut(
        {name: {key: np.array(v) for key, v in found.items()} for name, found in values.items()},
        {name: np.array(shares) for name, shares in places.items()},
        tuple(tokens),
        model.name,
        seed,
    )


def _run(
    model: LoadedModel,
    prompt: Prompt,
    edit: TextRows,
    phis: dict[int, torch.Tensor],
    dims: Sequence[int] | None,
) -> torch.Tensor:
    """Log probabilities under the edit; `phis` gets phi [tokens] of what enters each layer."""

    def take(layer: int, hidden: torch.Tensor) -> None:
        phis[layer] = phi(hidden, dims)[0].cpu()

    with (
        torch.no_grad(),
        layer_inputs(model, take),
        listening(model, edit.on_layer, exclusive=True),
    ):
        return log_probabilities(model, prompt)


def _runs(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Stretches (first, end) of True."""
    steps = torch.nn.functional.pad(rows.int(), (1, 1)).diff()
    return list(
        zip(
            (steps == 1).nonzero()[:, 0].tolist(),
            (steps == -1).nonzero()[:, 0].tolist(),
            strict=True,
        )
    )


def _control(
    control: str,
    sinks: torch.Tensor,
    kind: torch.Tensor,
    received: torch.Tensor | None,
    random: np.random.Generator,
) -> torch.Tensor:
    """bool [tokens]: image tokens that are no sinks, none where there are no sinks."""
    hidden = torch.zeros_like(sinks)
    if received is None or not bool(sinks.any()):
        return hidden
    image = (kind == IMAGE).nonzero()[:, 0]
    mass = received.mean(0).cpu()[image].double().numpy()
    hidden[image[control_keys(control, sinks[image].numpy(), mass, random)]] = True
    return hidden


def _mass(rows: TextRows, keys: Sequence[torch.Tensor]) -> float:
    """Share of the rows' attention on these keys, mean over edited layers and heads."""
    shares = [
        float(received[:, keys[layer].to(received.device)].sum() / received.sum())
        for layer, received in rows.received.items()
    ]
    return float(np.mean(shares))


def _shares(rows: TextRows, kind: torch.Tensor, sinks: Sequence[torch.Tensor]) -> list[float]:
    """Of each of `PLACES`."""
    image = [(kind == IMAGE) & ~found for found in sinks]
    others = [[kind == number] * len(sinks) for number in (SYSTEM, TEXT)]
    return [_mass(rows, keys) for keys in (sinks, image, *others)]
