"""From where the text of a vision-language prompt gets what it says, layer by layer: edges cut, beside random ones.

In the rows of text after the image, in one layer (or a window of some), all edges to one kind of token are cut and rows are
normalised again: to the image, to what comes before it ("system"), or to as many tokens as the image has, drawn at random
from all that come before the text and from the text ("random", the control). What that changes in the predictions of the
text is how much of the flow went there, in that layer.

Geva et al. 2023, arXiv 2304.14767, for text; Zhang et al., "Cross-modal Information Flow in Multimodal Large Language
Models", arXiv 2411.18620, for pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, described
from lens.edits.attention import Knockout
from lens.edits.clean_runs import CleanRuns
from lens.edits.effects import effect
from lens.models.loaded import LoadedModel, check_loaded
from lens.passes.inputs import read_prompts
from lens.passes.keys import KeysAt
from lens.stats.intervals import columns
from lens.traces.segments import IMAGE, PADDING, SYSTEM, TEXT, segments

ROUTES = ("image", "system", "random")
_MEASURES = ("delta_loss", "kl", "mass")


@dataclass(frozen=True, eq=False)
class TextFlow(Result):
    """What cutting each route changes, by layer.

    Attributes:
        delta_loss, kl, mass: [routes, layers, prompts]: change of the loss of the text (nats per token), divergence of
            its predictions (nats), and share of the attention of the cut rows that the edges held; NaN where a prompt
            has no such token.
        layers: the first layer of each window.
        window: layers that are cut together.
        seed: of the random tokens and the intervals.
    """

    delta_loss: np.ndarray = field(repr=False)
    kl: np.ndarray = field(repr=False)
    mass: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    window: int
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per route and layer: `route`, `layer`, `mass`, `delta_loss` and `kl` with `_low` and `_high`, `n`, and
        `excess`, delta_loss minus that of the random tokens, with `_low` and `_high` (NaN for these)."""
        excess = self.delta_loss - self.delta_loss[-1]
        excess[-1] = np.nan
        return pd.DataFrame(
            {
                "route": np.repeat(ROUTES, len(self.layers)),
                "layer": np.tile(self.layers, len(ROUTES)),
                "mass": self.mass.mean(-1).ravel(),
                **columns("delta_loss", self.delta_loss, self.seed),
                **columns("kl", self.kl, self.seed),
                **columns("excess", excess, self.seed),
                "n": self.kl.shape[-1],
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """Where cutting the image changes the text most, beside random tokens there ("image"); the limit ("limit")."""
        kl = self.kl.mean(-1)
        at = int(kl[0].argmax())
        through = f" to {self.layers[at] + self.window - 1}" if self.window > 1 else ""
        return (
            Sentence(
                f"The text depends on its edges to the image most in layer {self.layers[at]}{through}: without them its "
                f"predictions move by {kl[0, at]:.3g} nats (KL), without as many random ones by {kl[2, at]:.3g}; "
                f"{self.mass[0, at].mean():.0%} of its attention went there, {self.mass[2, at].mean():.0%} to the random ones.",
                kind="image",
            ),
            Sentence(
                f"Measured on {self.kl.shape[-1]} prompts, each layer alone; what one layer lacks a later one may still "
                "fetch, so that a small change there does not mean that the text does without the image.",
                kind="limit",
            ),
        )

    def __repr__(self) -> str:
        return described(self)


def text_flow(
    model: LoadedModel,
    prompts: Any,
    *,
    window: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> TextFlow:
    """How much the text gets from the image in each layer, beside what it gets from elsewhere.

    Args:
        model: a vision-language model.
        prompts: one prompt of its processor, or a list of these.
        window: layers that are cut together, from each one on.
        seed: of the random tokens and the intervals.
        progress: show a bar.

    Raises:
        LensError: a prompt without an image or without text after it, or a window that the model has not.

    Reference:
        arXiv 2411.18620.

    Example:
        >>> lens.vision.text_flow(vlm, inputs, progress=False).table()[["route", "layer", "mass", "kl"]]
    """
    check_loaded(model)
    check_counts(window=window)
    attending = model.info.attending
    if window > len(attending):
        raise LensError(f"window must be 1 to {len(attending)}, the layers, got {window}")
    read, _ = read_prompts(model, prompts, whole=True)
    kinds = [segments(model, prompt.inputs, grid=()).kind[0] for prompt in read]
    for kind in kinds:
        if not bool((kind == IMAGE).any()) or not bool((kind == TEXT).any()):
            raise LensError("text_flow needs prompts with an image and text after it")
    clean = CleanRuns(model)
    starts = attending[: len(attending) - window + 1]
    found = np.full((len(_MEASURES), len(ROUTES), len(starts), len(read)), np.nan)
    with advancing(f"{model.name}: routes", len(starts), progress) as advance:
        for at in range(len(starts)):
            layers = attending[at : at + window]
            for place, route in enumerate(ROUTES):
                for number, (prompt, kind) in enumerate(zip(read, kinds, strict=True)):
                    keys = _keys(route, kind, seed + number)
                    if not bool(keys.any()):
                        continue
                    cut = Knockout(_of(kind == TEXT), _of(keys), layers=layers)
                    one = effect(
                        model,
                        [prompt.inputs],
                        cut,
                        controls=(),
                        scored=_of(kind == TEXT),
                        seed=seed,
                        clean=clean,
                        progress=False,
                    )
                    own = one.values["edit"]
                    found[:, place, at, number] = [own[name][0, 0] for name in _MEASURES]
            advance(1)
    loss, kl, mass = found
    return TextFlow(loss, kl, mass, tuple(starts), window, seed)


def _keys(route: str, kind: Tensor, seed: int) -> Tensor:
    """bool [tokens]: the keys of a route."""
    if route != "random":
        return kind == (IMAGE if route == "image" else SYSTEM)
    real = (kind != PADDING).nonzero()[:, 0]
    random = torch.Generator().manual_seed(seed)
    # The first token stays: it is seen by every row, so that no row is left without a key.
    drawn = real[1:][torch.randperm(len(real) - 1, generator=random)]
    chosen = torch.zeros_like(kind, dtype=torch.bool)
    chosen[drawn[: int((kind == IMAGE).sum())]] = True
    return chosen


def _of(chosen: Tensor) -> Callable[[KeysAt], Tensor]:
    def members(at: KeysAt) -> Tensor:
        places = at.positions.clamp(0, len(chosen) - 1).cpu()
        return (chosen[places] & (at.positions.cpu() >= 0)).to(at.positions.device)

    return members
