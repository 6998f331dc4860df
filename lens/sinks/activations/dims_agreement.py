"""Do sink dimensions mark what attention is parked on? Precision and recall against received attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.common.results import Result, Sentence
from lens.edits._phi import check_dims, phi
from lens.models.loaded import LoadedModel
from lens.passes.residual import layer_inputs
from lens.sinks.detection.alphas import alpha_of
from lens.traces.captures import capture


@dataclass(frozen=True, repr=False, eq=False)
class DimsAgreement(Result):
    """Tokens marked by `phi >= tau`, beside those that receive most attention, layer by layer.

    Attributes:
        marked, received: bool [layers, tokens]; layers that attend, and only tokens that count.
        layers: their numbers in the model.
        tau, top: of the two.
        model: its name.
    """

    marked: np.ndarray = field(repr=False)
    received: np.ndarray = field(repr=False)
    layers: tuple[int, ...]
    tau: float
    top: float
    model: str

    def table(self) -> pd.DataFrame:
        """One row per layer: `marked`, `received`, `both`, `precision`, `recall`, `base_rate`.

        Precision is NaN where nothing is marked; the base rate is the precision of a blind choice.
        """
        both = (self.marked & self.received).sum(1)
        marked, received = self.marked.sum(1), self.received.sum(1)
        return pd.DataFrame(
            {
                "layer": self.layers,
                "marked": marked,
                "received": received,
                "both": both,
                "precision": np.where(marked > 0, both / np.maximum(marked, 1), np.nan),
                "recall": both / received,
                "base_rate": received / self.marked.shape[1],
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """Precision beside the base rate and recall, over all layers, as the kind `agreement`."""
        rows = self.table()
        both, marked, received = (int(rows[name].sum()) for name in ("both", "marked", "received"))
        if not marked:
            text = f"No token of {self.model} reaches phi = {self.tau:g} in any layer."
            return (Sentence(text, kind="agreement"),)
        text = (
            f"Of {marked} tokens with phi >= {self.tau:g} (counted in each layer of {self.model}) "
            f"{both / marked:.1%} are among the {self.received.mean():.1%} that receive most attention, where a blind "
            f"choice gives {rows['base_rate'].mean():.1%}; {both / received:.1%} of those are marked."
        )
        return (Sentence(text, kind="agreement"),)


def dims_agreement(
    model: LoadedModel,
    inputs: Any,
    *,
    dims: Sequence[int] | None = None,
    tau: float = 20.0,
    top: float = 0.01,
    progress: bool = True,
) -> DimsAgreement:
    """Compare the sinks that VAR would find with where the attention of each layer really goes.

    A token counts where enough queries see it for `alpha` (`lens.sinks`), its mean over heads.

    Args:
        model, inputs: one prompt, as for `lens.capture`, with images or without.
        dims, tau: as in VAR.
        top: share of the tokens that "receive most"; at least one.
        progress: show a bar.

    Raises:
        LensError: top out of range, several prompts, or dims that the model has not.

    Example:
        >>> lens.sinks.dims_agreement(vlm, inputs, dims=(3, 7)).table()
    """
    if not (is_number(top) and 0 < top < 1):
        raise LensError(f"top is a share between 0 and 1, got {top}")
    check_dims(model, dims)
    marks: dict[int, torch.Tensor] = {}

    def take(layer: int, hidden: torch.Tensor) -> None:
        marks[layer] = (phi(hidden, dims)[0] >= tau).cpu()

    with layer_inputs(model, take):
        trace = capture(model, inputs, statistics=["received"], progress=progress)
    if isinstance(trace, list):
        if len(trace) != 1:
            raise LensError(
                f"dims_agreement reads one prompt, got {len(trace)}; pass them one by one"
            )
        trace = trace[0]
    alpha = alpha_of(trace)
    counted = ~np.isnan(alpha).any((0, 1))
    mean = alpha[..., counted].mean(1)  # [layers, tokens]
    count = max(1, round(top * mean.shape[1]))
    received = np.zeros(mean.shape, dtype=bool)
    np.put_along_axis(received, np.argsort(-mean, axis=1, kind="stable")[:, :count], True, axis=1)
    marked = torch.stack([marks[layer] for layer in trace.layers]).numpy()[:, counted]
    return DimsAgreement(marked, received, tuple(trace.layers), float(tau), float(top), model.name)
