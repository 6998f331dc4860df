"""Massive activations: the few huge numbers in the residual stream that go with sinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.edits.losses import bos_policy
from lens.edits.parts import Activation
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.residual import stream

RATIO, MAGNITUDE = 1000.0, 100.0


@dataclass(frozen=True, repr=False, eq=False)
class MassiveActivations(Result):
    """Massive activations of a model on some prompts.

    Attributes:
        rows: one per (dimension, position) that is massive somewhere: `emergence`, the first layer
            whose output has it in most of the prompts where it ever is (-1: the embedding),
            `vanishing`, the layer behind the last whose output has it in most of them (NaN: it stays to
            the end), `value`, its mean at emergence (signed), `ratio`, the largest `|h| / median`,
            `prompts`, the share of prompts with it, `token`, its most frequent token.
        top: [prompts, layers + 1, 3], the largest |h| of each layer; median: [prompts, layers + 1].
            The first is what enters layer 0.
        ratio, magnitude: thresholds.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
    """

    rows: pd.DataFrame = field(repr=False)
    top: np.ndarray = field(repr=False)
    median: np.ndarray = field(repr=False)
    ratio: float
    magnitude: float
    tokens: tuple[int, ...]
    bos: str

    @property
    def dimensions(self) -> list[int]:
        """The dimensions, ascending."""
        return sorted(set(self.rows["dimension"].tolist()))

    @property
    def positions(self) -> list[int]:
        """The positions, ascending."""
        return sorted(set(self.rows["position"].tolist()))

    @property
    def layer(self) -> int | None:
        """The first layer of emergence, or None."""
        return None if self.rows.empty else int(self.rows["emergence"].min())

    def table(self) -> pd.DataFrame:
        """The rows with thresholds, BOS policy and number of prompts."""
        return self.rows.assign(
            threshold_ratio=self.ratio,
            threshold_magnitude=self.magnitude,
            bos=self.bos,
            n=len(self.tokens),
        )

    def edits(self, to: Literal["zero", "mean"] = "zero") -> tuple[Activation, ...]:
        """For `lens.edit` and `lens.effect`: each one set where it emerges; all later layers run on.

        Experiment 3 of Sun et al.

        Args:
            to: "zero", or "mean", that of these prompts.

        Raises:
            LensError: none was found, another `to`.

        Example:
            >>> found = lens.sinks.massive(model, texts, ratio=20, magnitude=1)
            >>> lens.effect(model, texts, found.edits()).table()
        """
        values = {"zero": np.zeros(len(self.rows)), "mean": self.rows["value"].to_numpy()}
        return self._set_to(values[check_choice("to", to, ("zero", "mean"))])

    def others(
        self, model: LoadedModel, prompts: Any
    ) -> Callable[[Prompt], tuple[Activation, ...]]:
        """For `lens.effect` of these prompts: each one set to its mean over the other prompts.

        Raises:
            LensError: none was found, one prompt alone.
        """
        layer, position, dimension = (
            self.rows[name].to_numpy() for name in ("emergence", "position", "dimension")
        )
        read = read_prompts(model, prompts)[0]
        if len(read) < 2:
            raise LensError("others needs at least two prompts: each takes the mean of the others")
        streams = (stream(model, prompt).numpy() for prompt in read)
        own = np.stack([one[layer + 1, position, dimension] for one in streams])
        means = (own.sum(0) - own) / (len(own) - 1)
        edits = {
            tuple(prompt.ids or ()): self._set_to(values)
            for prompt, values in zip(read, means, strict=True)
        }
        return lambda prompt: edits[tuple(prompt.ids or ())]

    def _set_to(self, values: np.ndarray) -> tuple[Activation, ...]:
        if self.rows.empty:
            raise LensError("no massive activation was found, so there is none to edit")
        places = self.rows[["emergence", "position", "dimension"]].to_numpy().tolist()
        return tuple(
            Activation(int(layer), int(position), int(dimension), float(value))
            for (layer, position, dimension), value in zip(places, values, strict=True)
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How many dimensions, as the kind `dimensions`, and each of them; or how far the largest came."""
        limits = f"|h| > {self.magnitude:g} and |h| ≥ {self.ratio:g} × the layer's median"
        ending = f"{len(self.tokens)} prompts of {min(self.tokens)} to {max(self.tokens)} tokens, BOS {self.bos}"
        if self.rows.empty:
            ratio = self.top[..., 0] / self.median
            text = (
                f"No activation is massive ({limits}): the largest is {self.top.max():.3g}, and the "
                f"largest ratio to a median {ratio.max():.3g} ({ending})."
            )
            return (Sentence(text, kind="dimensions"),)
        count = len(self.dimensions)
        massive = (
            f"{count} dimension{'s are' if count > 1 else ' is'} massive ({limits}; {ending})."
        )
        found = [Sentence(massive, kind="dimensions")]
        for row in self.rows.to_dict("records"):
            gone = (
                "stays to the last layer"
                if np.isnan(row["vanishing"])
                else f"is gone after layer {row['vanishing']:.0f}"
            )
            text = (
                f"Dimension {row['dimension']} at position {row['position']} ({row['token']!r}) appears "
                f"after layer {row['emergence']} with {row['value']:.0f}, reaches {row['ratio']:.0f} "
                f"medians, {gone}; in {row['prompts']:.0%} of the prompts."
            )
            found.append(Sentence(text, kind="dimension"))
        return tuple(found)


def massive(
    model: LoadedModel,
    prompts: Any,
    *,
    ratio: float = RATIO,
    magnitude: float = MAGNITUDE,
    progress: bool = True,
) -> MassiveActivations:
    """Find the dimensions, tokens and layers with massive activations; nothing is known beforehand.

    `|h| > magnitude` and `|h| >= ratio * median |h|` over all tokens and dimensions of the layer's
    output (Sun et al., arXiv 2402.17762). Small models have smaller numbers: lower the thresholds,
    which every result states.

    Args:
        model: as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        ratio, magnitude: thresholds.
        progress: show a bar.

    Raises:
        LensError: thresholds that are not positive (0 is allowed for `magnitude`), prompts without
            tokens, a model whose layers are not found.

    Example:
        >>> found = lens.sinks.massive(model, texts)
        >>> found.dimensions, found.layer
    """
    if not ratio > 0 or not magnitude >= 0:
        raise LensError(f"ratio must be above 0 and magnitude at least 0, got {ratio}, {magnitude}")
    asked = read_prompts(model, prompts)[0]
    if any(prompt.ids is None for prompt in asked):
        raise LensError("massive needs prompts of tokens; for images: lens.sinks.high_norm")
    ids = [prompt.ids or [] for prompt in asked]
    hits, top, median = [], [], []
    with advancing("massive activations", len(asked), progress) as advance:
        for number, prompt in enumerate(asked):
            h = stream(model, prompt)  # [layers + 1, tokens, width]
            size = h.abs()
            middle = size.flatten(1).median(1).values
            top.append(size.flatten(1).topk(3).values)
            median.append(middle)
            is_massive = (size > magnitude) & (size >= (middle * ratio)[:, None, None])
            for layer, position, dimension in is_massive.nonzero().tolist():
                value = float(h[layer, position, dimension])
                place = (number, layer - 1, position, dimension)
                hits.append((*place, value, abs(value) / float(middle[layer])))
            advance(1)
    columns = ["prompt", "layer", "position", "dimension", "value", "ratio"]
    rows = _rows(pd.DataFrame(hits, columns=columns), model, ids)
    return MassiveActivations(
        rows,
        torch.stack(top).numpy(),
        torch.stack(median).numpy(),
        ratio,
        magnitude,
        tuple(len(one) for one in ids),
        bos_policy(model, ids),
    )


def _rows(hits: pd.DataFrame, model: LoadedModel, ids: Sequence[Sequence[int]]) -> pd.DataFrame:
    columns = (
        "dimension", "position", "token", "emergence", "vanishing", "value", "ratio", "prompts",
    )  # fmt: skip
    rows = []
    for (dimension, position), group in hits.groupby(["dimension", "position"]):
        having = group["prompt"].unique()
        often = group.groupby("layer")["prompt"].nunique() > len(having) / 2
        layers = [int(layer) for layer in often.index[often]] or [int(group["layer"].min())]
        last = max(layers)
        tokens = [ids[number][position] for number in having]
        rows.append(
            {
                "dimension": dimension,
                "position": position,
                "token": model.token_strings([max(set(tokens), key=tokens.count)])[0],
                "emergence": layers[0],
                "vanishing": np.nan if last == model.info.layers - 1 else last + 1,
                "value": group.loc[group["layer"] == layers[0], "value"].mean(),
                "ratio": group["ratio"].max(),
                "prompts": len(having) / len(ids),
            }
        )
    table = pd.DataFrame(rows, columns=list(columns))
    return table.sort_values("ratio", ascending=False, ignore_index=True)
