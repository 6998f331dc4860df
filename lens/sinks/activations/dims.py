"""Sink dimensions: coordinates of the residual stream that are huge at sink tokens, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import check_mapping, is_number
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.edits._phi import EPSILON
from lens.models.loaded import LoadedModel
from lens.passes.residual import layer_inputs
from lens.passes.sessions import base


@dataclass(frozen=True, repr=False, eq=False)
class SinkDims(Result):
    """The dimensions that pass tau, and how well they single out what attention is parked on.

    Attributes:
        dims: found, the most frequent first.
        largest: [layers, width], largest `|x_d| / RMS(x)` of any token in what enters each layer.
        tokens: [layers, width], number of tokens at which it passes tau.
        tau: of the search.
        counted: tokens that were looked at.
        model: its name.
    """

    dims: tuple[int, ...]
    largest: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    tau: float
    counted: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per dimension found: where it emerges and vanishes, how large it gets."""
        rows = []
        for dim in self.dims:
            layers = np.flatnonzero(self.tokens[:, dim])
            rows.append(
                {
                    "dim": dim,
                    "first_layer": int(layers[0]),
                    "last_layer": int(layers[-1]),
                    "layers": len(layers),
                    "largest": float(self.largest[:, dim].max()),
                    "tokens": int(self.tokens[:, dim].max()),
                }
            )
        columns = ["dim", "first_layer", "last_layer", "layers", "largest", "tokens"]
        return pd.DataFrame(rows, columns=columns)

    def findings(self) -> tuple[Sentence, ...]:
        """Which dimensions were found, as the kind `dims`, and the `limit`."""
        if not self.dims:
            width = self.largest.shape[1]
            bound = "" if width**0.5 > self.tau else f" (with {width} dimensions none can)"
            text = (
                f"No dimension of {self.model} passes {self.tau:g} times the RMS on {self.counted} "
                f"tokens: the largest reaches {self.largest.max():.1f}{bound}."
            )
            return (Sentence(text, kind="dims"),)
        found = ", ".join(
            f"{row['dim']} (up to {row['largest']:.0f} times the RMS, at most {row['tokens']} of "
            f"{self.counted} tokens, entering layers {row['first_layer']} to {row['last_layer']})"
            for row in self.table().to_dict("records")
        )
        several = "s" * (len(self.dims) > 1)
        limit = (
            "A large coordinate marks candidates; whether attention is parked there is another measurement "
            "(lens.sinks.dims_agreement)."
        )
        return (
            Sentence(
                f"{len(self.dims)} sink dimension{several} of {self.model}: {found}.", kind="dims"
            ),
            Sentence(limit, kind="limit"),
        )


def dims(
    model: LoadedModel,
    inputs: Any,
    *,
    tau: float = 20.0,
    largest_share: float = 0.1,
    progress: bool = True,
) -> SinkDims:
    """Dimensions with `|x_d| / RMS(x) >= tau` at few tokens, in what enters at least one layer.

    Args:
        model: as `lens.load` returns it.
        inputs: keyword arguments of the model (a processor's output); one prompt or more, unpadded.
        tau: as in VAR.
        largest_share: a dimension that passes at more than this share of the tokens is a constant
            offset of the model and no mark of a sink; it is left out.
        progress: show a bar.

    Raises:
        LensError: tau or share out of range, padding, or layers that cannot be read.

    Example:
        >>> lens.sinks.dims(model, {"input_ids": ids}).table()
    """
    check_mapping(inputs=inputs)
    numbers = is_number(tau) and is_number(largest_share)
    if not (numbers and tau > 0 and 0 < largest_share <= 1):
        raise LensError(
            f"tau must be above 0 and largest_share in 0..1, got {tau} and {largest_share}"
        )
    real = inputs.get("attention_mask")
    if real is not None and not bool(torch.as_tensor(real).bool().all()):
        raise LensError("dims reads prompts without padding; pass them one by one")
    largest: dict[int, torch.Tensor] = {}
    passing: dict[int, torch.Tensor] = {}
    counted = 0

    def take(layer: int, hidden: torch.Tensor) -> None:
        nonlocal counted
        size = hidden.float().flatten(0, -2)
        size = size.abs() * size.pow(2).mean(-1, keepdim=True).add(EPSILON).rsqrt()
        counted = len(size)
        largest[layer], passing[layer] = size.amax(0).cpu(), (size >= tau).sum(0).cpu()
        advance(1)

    bar = advancing("sink dimensions", model.info.layers, progress)
    with bar as advance, torch.no_grad(), layer_inputs(model, take):
        base(model)(**inputs)
    tokens = torch.stack([passing[layer] for layer in sorted(passing)])
    most = tokens.amax(0)
    chosen = ((most > 0) & (most <= largest_share * counted)).nonzero()[:, 0]
    order = tokens.gt(0).sum(0)[chosen].argsort(descending=True, stable=True)
    return SinkDims(
        tuple(chosen[order].tolist()),
        torch.stack([largest[layer] for layer in sorted(largest)]).numpy(),
        tokens.numpy(),
        float(tau),
        counted,
        model.name,
    )
