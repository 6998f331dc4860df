"""From where the text of a vision-language prompt gets what it says, layer by layer: edges cut, beside random ones.

In the rows of text after the image, in one layer (or a window of some), all edges to one kind of token are cut and rows are
normalised again: to the image, or to what comes before it ("system"). A cut of the whole image has no control: too few other
tokens are left. So random tokens of the image ("image_part") are cut too, half as many as the image or the other tokens have,
whichever are fewer, and beside them as many of no image ("other_part", the control). What a cut changes in the predictions of
the text is how much of the flow went there, in that layer.

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

from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, ends, few
from lens.edits.attention import Knockout
from lens.edits.clean_runs import CleanRuns
from lens.edits.effects import effect
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.passes.keys import KeysAt
from lens.stats.intervals import columns
from lens.stats.verdicts import rivals
from lens.traces.segments import IMAGE, PADDING, SYSTEM, TEXT, segments

ROUTES = ("image", "system", "image_part", "other_part")
_MEASURES = ("delta_loss", "kl", "mass")


@dataclass(frozen=True, repr=False, eq=False)
class TextFlow(Result):
    """What cutting each route changes, by layer.

    Attributes:
        delta_loss, kl, mass: [routes, layers, prompts]: change of the loss of the text (nats per token), divergence of
            its predictions (nats), and share of the attention of the cut rows that the edges held; NaN where a prompt
            has no such token.
        keys: [routes, prompts], tokens whose edges are cut.
        layers, last: the first and the last layer of each window.
        window: layers that are cut together.
        seed: of the random tokens and the intervals.
    """

    delta_loss: np.ndarray = field(repr=False)
    kl: np.ndarray = field(repr=False)
    mass: np.ndarray = field(repr=False)
    keys: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    last: tuple[int, ...]
    window: int
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per route and layer: `route`, `layer`, `keys`, `mass`, `delta_loss` and `kl` with `_low` and `_high`, `n`,
        and of "image_part" `excess`, its kl minus that of "other_part", with `_low` and `_high` (NaN for the rest)."""
        excess = np.full_like(self.kl, np.nan)
        excess[2] = self.kl[2] - self.kl[3]
        return pd.DataFrame(
            {
                "route": np.repeat(ROUTES, len(self.layers)),
                "layer": np.tile(self.layers, len(ROUTES)),
                "keys": np.repeat(self.keys.mean(-1), len(self.layers)),
                "mass": self.mass.mean(-1).ravel(),
                **columns("delta_loss", self.delta_loss, self.seed, shares=False),
                **columns("kl", self.kl, self.seed, shares=False),
                **columns("excess", excess, self.seed, shares=False),
                "n": self.kl.shape[-1],
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """Where cutting the image changes the text most ("image"), whether image tokens count for more there than others
        ("control"), and the limit ("limit")."""
        at = int(self.kl[0].mean(-1).argmax())
        places = [
            f"layer {first}" if first == last else f"layers {first} to {last}"
            for first, last in zip(self.layers, self.last, strict=True)
        ]
        place, alike = places[at], rivals(self.kl[0], at, self.seed)
        if self.kl.shape[-1] == 1:
            beside = " (of one prompt)"
        else:
            beside = (
                f", not told apart from {few([places[one] for one in alike], 3)}" if alike else ""
            )
        whole, _, part, others = self.kl[:, at].mean(-1)
        table = self.table()
        row = table[(table["route"] == "image_part").to_numpy()].iloc[at]
        low, high = row["excess_low"], row["excess_high"]
        count = f"{self.keys[2].mean():.3g} random image tokens"
        if np.isnan(row["excess"]):
            compared = "Too few tokens are left to compare image tokens with others"
        elif low > 0 or high < 0:
            more = "more" if low > 0 else "less"
            compared = f"In {place} the text depends on {count} {more} than on as many others"
        else:
            why = "on one prompt, without an interval" if np.isnan(low) else "the interval holds 0"
            compared = f"In {place} {count} are not told from as many others ({why})"
        return (
            Sentence(
                f"The text depends on its edges to the image most in {place}{beside}: without them its predictions move by "
                f"{whole:.3g} nats (KL); {self.mass[0, at].mean():.0%} of its attention went there.",
                kind="image",
            ),
            Sentence(
                f"{compared}: {part:.3g} and {others:.3g} nats, difference {row['excess']:.3g}{ends(low, high, '.3g')}.",
                kind="control",
            ),
            Sentence(
                f"Measured on {self.kl.shape[-1]} prompt{'s' * (self.kl.shape[-1] > 1)}, "
                f"{'each layer alone' if self.window == 1 else f'{self.window} layers that attend at once'}; what these lack a later one may still "
                "fetch, so that a small change there does not mean that the text does without the image.",
                kind="limit",
            ),
        )


def text_flow(
    model: LoadedModel,
    prompts: Any,
    *,
    window: Count = 1,
    seed: Seed = 0,
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
    cut = [_routes(kind, seed + number) for number, kind in enumerate(kinds)]
    found = np.full((len(_MEASURES), len(ROUTES), len(starts), len(read)), np.nan)
    with advancing(f"{model.name}: routes", len(starts), progress) as advance:
        for at in range(len(starts)):
            layers = attending[at : at + window]
            for number, (prompt, kind) in enumerate(zip(read, kinds, strict=True)):
                text = _of(kind == TEXT)
                for place, keys in enumerate(cut[number]):
                    if not bool(keys.any()):
                        continue
                    one = effect(
                        model,
                        [prompt.inputs],
                        Knockout(text, _of(keys), layers=layers),
                        controls=(),
                        scored=text,
                        seed=seed,
                        clean=clean,
                        progress=False,
                    )
                    own = one.values["edit"]
                    found[:, place, at, number] = [own[name][0, 0] for name in _MEASURES]
            advance(1)
    counts = np.array([[int(keys.sum()) for keys in routes] for routes in cut]).T
    return TextFlow(
        *found,
        keys=counts,
        layers=tuple(starts),
        last=tuple(attending[window - 1 :]),
        window=window,
        seed=seed,
    )


def _routes(kind: Tensor, seed: int) -> list[Tensor]:
    """bool [tokens] of each of `ROUTES`: which keys it has in a prompt."""
    random = torch.Generator().manual_seed(seed)
    # The first token stays: it is seen by every row, so that no row is left without a key.
    real = (kind != PADDING).nonzero()[1:, 0]
    pools = [real[(kind[real] == IMAGE) == is_image] for is_image in (True, False)]
    count = -(-min(map(len, pools)) // 2)
    found = [kind == IMAGE, kind == SYSTEM]
    for pool in pools:
        chosen = torch.zeros_like(kind, dtype=torch.bool)
        chosen[pool[torch.randperm(len(pool), generator=random)[:count]]] = True
        found.append(chosen)
    return found


def _of(chosen: Tensor) -> Callable[[KeysAt], Tensor]:
    def members(at: KeysAt) -> Tensor:
        places = at.positions.clamp(0, len(chosen) - 1).cpu()
        return (chosen[places] & (at.positions.cpu() >= 0)).to(at.positions.device)

    return members
