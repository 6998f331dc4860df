"""How compressed and how sparse what a layer works with is (CRATE).

Yu et al., "White-Box Transformers via Sparse Rate Reduction", NeurIPS 2023, arXiv 2306.01129. Of the values of a head, one
unit vector z per position (m of them, p numbers each),

    R = 1/2 logdet(I + p / (m eps^2) Z^T Z),    eps^2 = 0.01:

tokens on one line have 1/2 log(1 + p / eps^2), tokens spread evenly over p directions 1/2 p log(1 + 1 / eps^2). Ordinary
transformers have no ISTA step with exact zeros; sparsity is the share of numbers of what enters a layer below 0.001 of
their root mean square.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import Seed
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.models.loaded import LoadedModel
from lens.models.stages import stages
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import read_prompts
from lens.passes.residual import layer_inputs
from lens.passes.sessions import listening, run
from lens.stats.intervals import over_units
from lens.vision._patches import head_table

EPSILON2 = 0.01
_ZERO = 1e-3


@dataclass(frozen=True, repr=False, eq=False)
class CodingRate(Result):
    """Rates of every head and sparsity of every layer, mean over prompts.

    Attributes:
        rate: [layers, heads] nats.
        change: low and high end of what the last layer has over the first, mean over heads: the 95 % interval over
            prompts; NaN of a single one.
        sparsity: [layers] share of numbers near zero in what enters the layer.
        lowest, highest: rates of tokens on one line, and spread evenly over as many directions as they can have, mean over
            prompts.
        n: prompts.
        layers: numbers of the layers.
    """

    rate: np.ndarray = field(repr=False)
    change: tuple[float, float]
    sparsity: np.ndarray = field(repr=False)
    lowest: float
    highest: float
    n: int
    layers: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `rate`, `spread` (0 on one line, 1 evenly spread), `sparsity`."""
        spread = (self.rate - self.lowest) / (self.highest - self.lowest)
        sparsity = np.broadcast_to(self.sparsity[:, None], self.rate.shape)
        return head_table(self.layers, {"rate": self.rate, "spread": spread, "sparsity": sparsity})

    def findings(self) -> tuple[Sentence, ...]:
        """How the rate changes over the layers ("rate"), and whether that holds over prompts ("change")."""
        by_layer = self.rate.mean(-1)
        low, high = self.change
        told = "rises" if low > 0 else "falls" if high < 0 else "is not told apart from no change"
        held = f"The coding rate {told} from first to last layer: {low:+z.2f} to {high:+z.2f} nats over {self.n} prompts."
        return (
            Sentence(
                f"The coding rate of values goes from {by_layer[0]:.1f} nats in layer {self.layers[0]} to {by_layer[-1]:.1f} in "
                f"layer {self.layers[-1]} (on one line {self.lowest:.1f}, spread evenly {self.highest:.1f}; n = {self.n}).",
                kind="rate",
            ),
            Sentence(
                held
                if np.isfinite(low)
                else "Of one prompt the change of the coding rate has no interval.",
                kind="change",
            ),
        )


def rate(vectors: Tensor) -> Tensor:
    """[...] nats: coding rate of vectors [..., positions, p], each made a unit vector.

    Example:
        >>> from lens.vision.coding import rate
        >>> round(float(rate(torch.ones(5, 8))), 5)
        3.34293
    """
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    count, size = unit.shape[-2:]
    product = unit.mT @ unit if size <= count else unit @ unit.mT
    eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return 0.5 * torch.logdet(eye + size / (count * EPSILON2) * product)


def coding_rate(
    model: LoadedModel, prompts: Any, *, seed: Seed = 0, progress: bool = True
) -> CodingRate:
    """The coding rate of the values of every head, and the sparsity of what enters every layer.

    Args:
        model: any that can be captured.
        prompts: as of `lens.capture`.
        seed: of the interval over prompts.
        progress: show a bar.

    Raises:
        LensError: as `lens.capture`.

    Reference:
        arXiv 2306.01129; grouped queries share their values, and so their rate.

    Example:
        >>> lens.vision.coding_rate(vit, {"pixel_values": images}).table()
    """
    found, _ = read_prompts(model, prompts, whole=True)
    of_stage = stages(model.transformer).get(model.chosen)
    rates: list[dict[int, np.ndarray]] = []
    ends: list[tuple[float, float]] = []
    zeros: list[list[float]] = []
    with advancing(f"{model.name}: coding rate", len(found), progress) as advance:
        for prompt in found:
            values: dict[int, np.ndarray] = {}
            sparse: dict[int, float] = {}

            def on_layer(call: LayerCall, values: dict[int, np.ndarray] = values) -> Tensor:
                own = rate(call.value[0]).cpu().numpy()
                ends.append(_ends(*call.value.shape[2:]))
                values[call.layer] = np.repeat(own, call.query.shape[1] // len(own))
                return attend(call).output

            def take(layer: int, hidden: Tensor, sparse: dict[int, float] = sparse) -> None:
                size = hidden.detach().float()
                sparse[layer] = float(
                    (size.abs() < _ZERO * size.pow(2).mean().sqrt()).float().mean()
                )

            with torch.no_grad(), layer_inputs(model, take, of_stage), listening(model, on_layer):
                run(model, prompt.inputs)
            rates.append(values)
            zeros.append([sparse.get(layer, np.nan) for layer in sorted(values)])
            advance(1)
    layers = tuple(sorted(rates[0]))
    each = np.array([[one[layer] for layer in layers] for one in rates])
    gained = each[:, -1].mean(-1) - each[:, 0].mean(-1)
    change = over_units(gained, np.ones_like(gained), seed, shares=False)
    lowest, highest = np.mean(ends, 0).tolist()
    return CodingRate(
        rate=each.mean(0),
        change=(float(change[0]), float(change[1])),
        sparsity=np.mean(zeros, 0),
        lowest=lowest,
        highest=highest,
        n=len(found),
        layers=layers,
    )


def _ends(count: int, size: int) -> tuple[float, float]:
    """Least and largest rate of `count` unit vectors of `size` numbers, nats: of one direction, of min(count, size) alike."""
    most = min(count, size)
    lowest, highest = (0.5 * rank * np.log1p(size / (rank * EPSILON2)) for rank in (1, most))
    return float(lowest), float(highest)
