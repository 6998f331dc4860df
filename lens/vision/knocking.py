"""Knock-out of edges from text to image tokens: does the text miss its visual sinks?

In the rows of text after the image, and nowhere else, the edges to the visual sinks of each layer are
hidden and the rest is normalised again; then as many edges to other image tokens instead (E7 of the
protocol of causal tests). Sinks are image tokens with `phi >= tau` in what enters the layer.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv
2503.03321, figure 3b: without its visual sinks the model hardly changes, without as many random image
tokens it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Count, Seed, check_choice, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.results import Sentence
from lens.edits._others import by_layer
from lens.edits._phi import check_dims, phi
from lens.edits.attention import Knockout
from lens.edits.base import selected_heads
from lens.edits.effect_results import Effect
from lens.edits.effects import effect
from lens.edits.running import edit
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.keys import KeysAt
from lens.passes.residual import layer_inputs
from lens.stats.intervals import over_units
from lens.traces.segments import IMAGE, SYSTEM, TEXT, segments

CONTROLS = ("size", "mass", "position")
PLACES = ("sinks", "other image tokens", "tokens before the image", "the text")


@dataclass(frozen=True, repr=False, eq=False)
class KnockOut(Effect):
    """`Effect` on text of edges to its visual sinks, and where the attention went.

    `keys` counts those of a layer, `mass` is their share of the text rows' attention.

    Attributes:
        places: [2, prompts, 4], before and after: share of these rows' attention on each of `PLACES`,
            mean over the edited heads.
    """

    places: np.ndarray = field(default_factory=lambda: np.zeros((2, 0, 4)), repr=False)

    def findings(self) -> tuple[Sentence, ...]:
        """As `Effect`, and where the attention went, as the kind `went`."""
        before = self.places[0].mean(0)
        each = (self.places[1] - self.places[0])[:, 1:]
        gained = each.mean(0)
        second, most = np.argsort(gained, kind="stable")[-2:]
        more = each[:, most] - each[:, second]
        low, high = over_units(more, np.ones_like(more), self.seed, shares=False)
        beside = f", {low:.1%} to {high:.1%} more than to {PLACES[1 + second]}"
        if not low > 0:
            beside = f", which is not told apart from {PLACES[1 + second]}"
        if np.isnan(low):
            beside = " on one prompt"
        text = (
            f"The attention taken from the sinks, {before[0]:.1%} of the text's, went most to "
            f"{PLACES[1 + most]} ({gained.max():+.1%}){beside}, so that a small effect alone does "
            "not prove them irrelevant."
        )
        return (*super().findings(), Sentence(text, kind="went"))


def knock_out(
    model: LoadedModel,
    prompts: Any,
    *,
    dims: Sequence[int] | None = None,
    tau: float = 20.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    controls: Sequence[Any] = CONTROLS,
    draws: Count = 1,
    seed: Seed = 0,
    progress: bool = True,
) -> KnockOut:
    """Hide the edges from text to its visual sinks, and to as many other image tokens.

    `lens.effect` of a `Knockout` whose keys are found in each prompt and layer; predictions of text after
    the image are measured.

    Args:
        model: a vision-language model.
        prompts: one prompt of its processor, or a list of these.
        dims: sink dimensions, from `lens.sinks.dims`; None: all are looked at.
        tau: bound of phi.
        layers, heads: what is edited, as in `lens.edits.Mask`.
        controls: some of "size" (as many random image tokens), "mass" (random ones, added until their
            attention comes nearest to the sinks') and "position" (as many, the nearest in the prompt).
        draws, seed, progress: as of `lens.effect`.

    Raises:
        LensError: a prompt without images, sinks in no layer, fewer other image tokens than sinks, an
            unknown control, no head, or dims and layers that the model has not.

    Reference:
        arXiv 2503.03321, figure 3b.

    Example:
        >>> found = lens.vision.knock_out(vlm, inputs, dims=(3, 7), tau=2)
        >>> found.table()[["condition", "mass", "delta_loss", "excess_low", "excess_high"]]
    """
    check_lists(controls=controls)
    for name in controls:
        check_choice("controls", name, CONTROLS)
    chosen = selected_heads(model, layers, heads)
    if not bool(chosen.any()):
        raise LensError("knock_out edits at least one head; layers and heads are empty")
    check_dims(model, dims)
    where = {"layers": layers, "heads": heads}
    seen: list[tuple[Prompt, Tensor]] = []

    def of(kind: int) -> Callable[[KeysAt], Tensor]:
        def members(at: KeysAt) -> Tensor:
            found = segments(model, {"input_ids": at.tokens}, grid=()).kind == kind
            return found.to(at.positions.device)

        return members

    def edges(prompt: Prompt) -> Knockout:
        if "pixel_values" not in prompt.inputs:
            raise LensError(
                "knock_out needs prompts with images: pass what a vision-language processor returns"
            )
        size = visual_phi(model, prompt, dims)
        sinks = (size >= tau) & chosen.any(1)[:, None]
        if not bool(sinks.any()):
            raise LensError(
                f"no image token is a sink: phi reaches {float(size.max()):.1f}, tau is {tau:g}; lower tau or "
                "look for other dims (lens.sinks.dims)"
            )
        seen.append((prompt, sinks))
        return Knockout(of(TEXT), by_layer(sinks), **where)

    asked = {"among": of(IMAGE), "scored": of(TEXT), "seed": seed, "progress": progress}
    found = effect(model, prompts, edges, controls=controls, draws=draws, **asked)
    places = [
        [_places(model, prompt, sinks, amount, of, where) for prompt, sinks in seen]
        for amount in (0.0, 1.0)
    ]
    return KnockOut(**vars(found), places=np.array(places))


def visual_phi(model: LoadedModel, prompt: Prompt, dims: Sequence[int] | None) -> Tensor:
    """[layers, tokens] of what enters each layer; 0 of tokens that are none of an image."""
    found: dict[int, Tensor] = {}

    def take(layer: int, hidden: Tensor) -> None:
        found[layer] = phi(hidden, dims)[0].cpu()

    with torch.no_grad(), edit(model), layer_inputs(model, take):
        model.model(**prompt.inputs)
    kind = segments(model, prompt.inputs, grid=()).kind[0]
    return torch.stack([found[layer] for layer in sorted(found)]) * (kind == IMAGE)


def _places(
    model: LoadedModel,
    prompt: Prompt,
    sinks: Tensor,
    amount: float,
    of: Callable[[int], Callable[[KeysAt], Tensor]],
    where: dict[str, Any],
) -> list[float]:
    """Share of the text rows' attention on each of `PLACES` with an amount of the sinks hidden."""
    hidden, image = by_layer(sinks), of(IMAGE)
    parts = [hidden, lambda at: image(at) & ~hidden(at), of(SYSTEM), of(TEXT)]
    edits = [
        Knockout(of(TEXT), keys, 0.0 if number else amount, **where)
        for number, keys in enumerate(parts)
    ]
    with torch.no_grad(), edit(model, *edits) as done:
        model.model(**prompt.inputs)
    heads = int(done[0].heads.sum())
    held = [sum(float(mass.mean()) for mass in one.before.values()) / heads for one in done]
    return [held[0] * (1 - amount), *held[1:]]
