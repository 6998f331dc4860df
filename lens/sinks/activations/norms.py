"""Tokens of unusually high norm, as vision transformers have them, and the neurons that write them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lens.common.choices import check_counts, is_whole
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.passes.residual import stream
from lens.passes.sessions import base

LEAST_SEPARATION, LEAST_RATIO = 4.0, 3.0
"""Two modes: Ashman's D of their log norms, and the ratio of their mean norms, at least these.

Halves of one normal distribution have D = 2.7, of a uniform one 3.5. Otsu's share of explained variance
would miss rare outliers, and 1 token in 40 is what large vision transformers have."""


@dataclass(frozen=True, repr=False, eq=False)
class HighNormTokens(Result):
    """Tokens whose norm after a layer lies beyond the valley between two modes.

    Attributes:
        norms: [prompts, tokens] after the layer; NaN behind the end of shorter prompts and for
            tokens that were left out.
        layer: the layer.
        cutoff: norm at the valley, or as given; NaN where there are no two modes.
        separation: Ashman's D between the two sides, `|difference of means| / sqrt(mean variance)` of
            log norms; NaN where a side is empty.
        ratio: geometric mean norm above the cutoff over that below.
        is_given: whether the cutoff was given.
        rows: one per outlier: `prompt`, `position`, `norm`.
        prompts: a digest of each prompt.
    """

    norms: np.ndarray = field(repr=False)
    layer: int
    cutoff: float
    separation: float
    ratio: float
    is_given: bool
    rows: pd.DataFrame = field(repr=False)
    prompts: tuple[str, ...] = field(repr=False)

    @property
    def share(self) -> float:
        """Share of the tokens that are outliers."""
        return len(self.rows) / int((~np.isnan(self.norms)).sum())

    def table(self) -> pd.DataFrame:
        """The outliers with layer and cutoff."""
        return self.rows.assign(layer=self.layer, cutoff=self.cutoff)

    def findings(self) -> tuple[Sentence, ...]:
        """What was found, or why there is nothing."""
        known = self.norms[~np.isnan(self.norms)]
        seen = f"{len(known)} tokens of {len(self.norms)} prompts, after layer {self.layer}"
        if np.isnan(self.cutoff):
            text = f"None found: the norms have one mode ({seen})." + (
                ""  # all are equal
                if np.isnan(self.separation)
                else f" The best cut separates their logarithms by D "
                f"= {self.separation:.2f} and norms by a factor of {self.ratio:.2f}; two modes need "
                f"{LEAST_SEPARATION:g} and {LEAST_RATIO:g}."
            )
        else:
            how = "given" if self.is_given else "the valley between two modes"
            times = "" if np.isnan(self.ratio) else f", {self.ratio:.1f} times the others' mean"
            text = (
                f"{len(self.rows)} tokens ({self.share:.2%}) have a norm above {self.cutoff:.3g} ({how}; "
                f"{seen}){times}."
            )
        return (Sentence(text, kind="tokens"),)

    def neurons(self, model: LoadedModel, prompts: Any, *, top: int = 10) -> pd.DataFrame:
        """MLP neurons by their mean |activation| at the outliers, strongest first.

        Columns `layer`, `neuron`, `outliers` (mean |activation| there), `others`, `ratio`. Layers up to the
        one where the outliers were found. Jiang et al., Vision Transformers Don't Need Trained Registers,
        arXiv 2506.08010. Neurons are what the last linear module of a layer reads.

        Args:
            model, prompts: as in `high_norm`, the same prompts.
            top: how many neurons.

        Raises:
            LensError: a number of neurons that is none, no outlier, other prompts, or a layer without a linear module behind its attention.

        Example:
            >>> pixels = {"pixel_values": images}
            >>> lens.sinks.high_norm(vit, pixels, cutoff=1, skip=1).neurons(vit, pixels)
        """
        check_counts(top=top)
        if self.rows.empty:
            raise LensError(
                "no token of high norm was found, so no neuron can be said to write one"
            )
        read = read_prompts(model, prompts)[0]
        if len(read) != len(self.norms):
            raise LensError(
                f"found has {len(self.norms)} prompts and {len(read)} were given; give the same ones"
            )
        if (given := tuple(one.inputs_sha256 for one in read)) != self.prompts:
            other = [one != own for one, own in zip(given, self.prompts, strict=True)].index(True)
            raise LensError(f"prompt {other} is another than was looked at; give the same ones")
        linear = [_linear(model, layer) for layer in list(blocks(model))[: self.layer + 1]]
        inputs: list[torch.Tensor] = []

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs.append(args[0][0].detach().float().abs().cpu())

        sums: dict[bool, Any] = {True: 0.0, False: 0.0}
        counts = {True: 0, False: 0}
        outlier = np.nan_to_num(self.norms) > self.cutoff
        with ExitStack() as stack, torch.no_grad():
            for module in linear:
                stack.callback(module.register_forward_pre_hook(keep).remove)
            for number, prompt in enumerate(read):
                inputs.clear()
                base(model)(**prompt.inputs)
                size = torch.stack(inputs).double()  # [layers, tokens, neurons]
                scored = ~np.isnan(self.norms[number, : size.shape[1]])
                for side in (True, False):
                    rows = torch.from_numpy((outlier[number, : size.shape[1]] == side) & scored)
                    sums[side] = sums[side] + size[:, rows].sum(1)
                    counts[side] += int(rows.sum())
        at = torch.as_tensor(sums[True]) / counts[True]
        others = torch.as_tensor(sums[False]) / max(1, counts[False])
        layer, neuron = np.unravel_index(
            at.flatten().argsort(descending=True)[:top].numpy(), at.shape
        )
        own, beside = (one[layer, neuron].numpy() for one in (at, others))
        table = {"layer": layer, "neuron": neuron, "outliers": own, "others": beside}
        return pd.DataFrame(table).assign(ratio=lambda rows: rows["outliers"] / rows["others"])


def _linear(model: LoadedModel, layer: nn.Module) -> nn.Linear:
    """The last linear module of a layer.

    Raises:
        LensError: it has none.
    """
    found = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise LensError(
            f"{model.info.class_name} has no linear module in its layers; its neurons are not known"
        )
    return found[-1]


def high_norm(
    model: LoadedModel,
    prompts: Any,
    *,
    layer: int = -1,
    cutoff: float | None = None,
    skip: int = 0,
    progress: bool = True,
) -> HighNormTokens:
    """Find tokens whose norm after a layer is beyond a cutoff, or beyond the valley of two modes.

    The valley is Otsu's threshold of the log norms. Where it does not part two modes (see
    `LEAST_SEPARATION` and `LEAST_RATIO`) nothing is returned as an outlier.

    Reference: Darcet et al., Vision Transformers Need Registers, arXiv 2309.16588.

    Args:
        model: as `lens.load` returns it; a vision transformer or any other.
        prompts: as for `lens.capture`, such as `{"pixel_values": images}`.
        layer: after which; negative numbers count from the end.
        cutoff: norm, or None for the valley.
        skip: tokens at the start that are no patches, such as 1 for CLS.
        progress: show a bar.

    Raises:
        LensError: a layer that is not there, a cutoff that is not positive, nothing left to look at.

    Example:
        >>> lens.sinks.high_norm(vit, {"pixel_values": images}, skip=1).findings()
    """
    layers = model.info.layers
    if not -layers <= layer < layers:
        raise LensError(f"layer must be {-layers} to {layers - 1}, got {layer}")
    if cutoff is not None and not cutoff > 0:
        raise LensError(f"cutoff must be a positive norm, got {cutoff}")
    if not is_whole(skip) or skip < 0:
        raise LensError(f"skip must be a number of tokens, 0 or more, got {skip!r}")
    layer %= layers
    found, asked = [], read_prompts(model, prompts)[0]
    with advancing("norms", len(asked), progress) as advance:
        for prompt in asked:
            found.append(stream(model, prompt)[layer + 1].norm(dim=-1))
            advance(1)
    norms = nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=torch.nan).numpy()
    norms[:, :skip] = np.nan
    known = norms[norms > 0]
    if len(known) < 2:
        raise LensError(
            f"high_norm needs at least two tokens behind the first {skip}, got {len(known)}"
        )
    threshold = otsu(np.log(known)) if cutoff is None else np.log(cutoff)
    is_above = known > np.exp(threshold)
    above, below = np.log(known[is_above]), np.log(known[~is_above])
    ratio = separation = np.nan
    if len(above) and len(below):
        gap, spread = above.mean() - below.mean(), np.sqrt((above.var() + below.var()) / 2)
        ratio, separation = float(np.exp(gap)), float(gap / spread) if spread else np.inf
    is_one = cutoff is None and not (separation >= LEAST_SEPARATION and ratio >= LEAST_RATIO)
    limit = np.nan if is_one else float(np.exp(threshold))
    places = np.argwhere(np.nan_to_num(norms) > limit)
    rows = pd.DataFrame(places, columns=["prompt", "position"])
    rows["norm"] = norms[tuple(places.T)]
    digests = tuple(prompt.inputs_sha256 for prompt in asked)
    return HighNormTokens(norms, layer, limit, separation, ratio, cutoff is not None, rows, digests)


def otsu(values: np.ndarray) -> float:
    """The cut with the largest variance between its sides, midway between two values.

    Exact, over all cuts between different values. All values equal: their value.
    """
    ordered = np.sort(np.asarray(values, float))
    ordered_mean = ordered.mean()
    count = np.arange(1, len(ordered))
    low = np.cumsum(ordered)[:-1] / count
    high = (ordered.sum() - np.cumsum(ordered)[:-1]) / (len(ordered) - count)
    weight = count / len(ordered)
    between = weight * (low - ordered_mean) ** 2 + (1 - weight) * (high - ordered_mean) ** 2
    between = np.where(np.diff(ordered) > 0, between, -1)
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)
