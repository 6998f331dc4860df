"""Bands of the unembedding's spectrum: where weights read and write, and what each band is worth."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.results import Result, described
from lens.edits.losses import bos_policy, two_tokens
from lens.heads.weights import head_weights
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.passes.replay import proved
from lens.stats import over_units

BANDS = 20


@dataclass(frozen=True, eq=False)
class SpectralBands:
    """Equal bands of the unembedding's singular directions, strongest first; the last ones are dark.

    Attributes:
        vectors: [d_model, d_model], one direction per column, in the order of `edges`.
        edges: [bands + 1], columns of each band.
        share: [bands], share of the squared singular values.
    """

    vectors: torch.Tensor = field(repr=False)
    edges: tuple[int, ...]
    share: np.ndarray

    def projector(self, band: int) -> torch.Tensor:
        """[d_model, d_model]: `V_band V_band^T`; the sum over the bands is the identity.

        Raises:
            LensError: a band that is not there.
        """
        if not 0 <= band < len(self.share):
            raise LensError(f"band must be 0 to {len(self.share) - 1}, got {band}")
        columns = self.vectors[:, self.edges[band] : self.edges[band + 1]]
        return columns @ columns.T

    def energies(self, weight: torch.Tensor) -> np.ndarray:
        """[bands]: share of `|W|_F^2` in each band, of [d_model, other]; they sum to 1.

        Raises:
            LensError: a weight with another first size, or one that is all 0.
        """
        if weight.dim() != 2 or len(weight) != len(self.vectors) or not bool(weight.any()):
            raise LensError(
                f"a weight must be [{len(self.vectors)}, other] and not 0, got {list(weight.shape)}"
            )
        squared = (self.vectors.T @ weight.double()).square().sum(1)
        parts = [
            float(squared[a:b].sum()) for a, b in zip(self.edges, self.edges[1:], strict=False)
        ]
        return np.array(parts) / sum(parts)


def bands(model: LoadedModel, *, count: int = BANDS) -> SpectralBands:
    """SVD of the unembedding (the last norm's scale folded in), cut into equal bands.

    Reference: Cancedda, Spectral Filters, Dark Signals, and Attention Sinks, arXiv 2402.09221.

    Raises:
        LensError: a count that is none, and an architecture whose weights are not known.
    """
    unembedding = head_weights(model).unembedding.double()  # [d_model, vocab]
    width = len(unembedding)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= width:
        raise LensError(f"count must be 1 to {width} (the width of the model), got {count!r}")
    values, vectors = torch.linalg.eigh(unembedding @ unembedding.T)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    edges = tuple(int(edge) for edge in np.linspace(0, width, count + 1).round())
    share = [float(values[a:b].sum()) for a, b in itertools.pairwise(edges)]
    return SpectralBands(vectors, edges, np.array(share) / sum(share))


def band_energies(model: LoadedModel, *, count: int = BANDS) -> pd.DataFrame:
    """Share of every head's weights in each band: one row per layer, head, weight and band.

    Weights "query", "key" and "value" read the stream, "output" writes it. By chance a band holds
    1 / count. Errors as in `bands`.

    Example:
        >>> lens.sinks.band_energies(model).query("weight == 'output'").groupby("band").energy.mean()
    """
    found, weights = bands(model, count=count), head_weights(model)
    rows: list[dict[str, Any]] = []
    for name in ("query", "key", "value", "output"):
        for layer, heads in enumerate(getattr(weights, name)):
            for head, weight in enumerate(heads):
                energy = found.energies(weight.T if name == "output" else weight)
                place = {"layer": layer, "head": head, "weight": name}
                rows += [
                    {**place, "band": band, "energy": part} for band, part in enumerate(energy)
                ]
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class BandLosses(Result):
    """What filtering each band from the last residual stream costs.

    Attributes:
        delta_loss: [bands, prompts], nats per token.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
        seed: of the bootstrap.
    """

    delta_loss: np.ndarray = field(repr=False)
    tokens: tuple[int, ...]
    bos: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per band, 95 % intervals over prompts."""
        values = self.delta_loss.T
        low, high = over_units(values, np.ones_like(values), self.seed)
        columns = {"band": range(len(low)), "delta_loss": values.mean(0), "low": low, "high": high}
        return pd.DataFrame(columns).assign(bos=self.bos, n=len(self.tokens))

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> list[str]:
        """The dearest band and the darkest."""
        table = self.table()
        most, dark = table.sort_values("delta_loss").iloc[-1], table.iloc[-1]
        return [
            f"Without band {most['band']} of {len(table)} the loss rises most, by "
            f"{most['delta_loss']:.3f} [{most['low']:.3f}, {most['high']:.3f}] nats per token; without "
            f"the darkest by {dark['delta_loss']:.3f} [{dark['low']:.3f}, {dark['high']:.3f}] "
            f"({len(self.tokens)} prompts, BOS {self.bos}). Only the stream before the last norm was "
            "filtered: what earlier layers read of a band is not in these numbers."
        ]


def band_losses(
    model: LoadedModel, prompts: Any, *, count: int = BANDS, seed: int = 0
) -> BandLosses:
    """Change of loss with each band projected out of the stream before the last norm.

    Args:
        model: a causal language model whose weights are known to `lens.heads`.
        prompts: as for `lens.capture`, token prompts.
        count: number of bands.
        seed: of the bootstrap.

    Raises:
        LensError: prompts of one token, and as in `bands`.

    Example:
        >>> lens.sinks.band_losses(model, texts).findings()
    """
    from lens.tasks.prompts import loss

    found, layout, read, deltas = bands(model, count=count), proved(model), [], []
    model, norm = layout.model, layout.final_norm.module
    assert norm is not None
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        plain, row = loss(model, ids), []
        for band in range(count):
            projector = found.projector(band).to(model.device, model.dtype)
            hook = norm.register_forward_pre_hook(
                lambda _, args, projector=projector: (args[0] - args[0] @ projector, *args[1:])
            )
            try:
                row.append(loss(model, ids) - plain)
            finally:
                hook.remove()
        deltas.append(row)
        read.append(ids)
    lengths = tuple(len(ids) for ids in read)
    return BandLosses(np.array(deltas).T, lengths, bos_policy(model, read), seed)
