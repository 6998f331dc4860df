"""Bands of the unembedding's spectrum: where weights read and write, and what each band is worth."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import Seed, is_whole
from lens.common.errors import LensError
from lens.common.head_ids import head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, with_ends
from lens.edits.losses import bos_policy, two_tokens
from lens.heads.weights import head_weights
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.passes.replay import proved
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many, of_many_told

BANDS = 20


@dataclass(frozen=True, repr=False, eq=False)
class SpectralBands(Result):
    """Equal bands of the unembedding's singular directions, strongest first; the last ones are dark.

    Attributes:
        vectors: [d_model, d_model], one direction per column, in the order of `edges`.
        edges: [bands + 1], columns of each band.
        share: [bands], share of the squared singular values.
        weights: one row per layer, head, weight and band: `energy`, the share of the weight in the band.
            Weights "query", "key" and "value" read the stream, "output" writes it.
        losses: what each band is worth, where prompts were given.
    """

    vectors: torch.Tensor = field(repr=False)
    edges: tuple[int, ...]
    share: np.ndarray
    weights: pd.DataFrame = field(repr=False)
    losses: BandLosses | None = field(repr=False, default=None)

    def projector(self, band: int) -> torch.Tensor:
        """[d_model, d_model]: `V_band V_band^T`; the sum over the bands is the identity.

        Raises:
            LensError: a band that is not there.
        """
        if not 0 <= band < len(self.share):
            raise LensError(f"band must be 0 to {len(self.share) - 1}, got {band}")
        own = self.vectors[:, self.edges[band] : self.edges[band + 1]]
        return own @ own.T

    def table(self) -> pd.DataFrame:
        """The share of every head's weights in each band, and `chance`, that of the directions, of which bands have nearly
        as many each."""
        return self.weights.assign(chance=self.chance[self.weights["band"]])

    @property
    def chance(self) -> np.ndarray:
        """[bands], share of the directions."""
        return np.diff(self.edges) / self.edges[-1]

    def findings(self) -> tuple[Sentence, ...]:
        """The share of the weights in the band of the smallest singular values, and what the bands are worth."""
        count = len(self.share)
        dark = self.weights[self.weights["band"] == count - 1]
        shares = dark.groupby("weight", sort=False)["energy"].mean()
        text = (
            f"Share of the weights in the weakest of {count} bands, mean over heads: "
            f"{', '.join(f'{name} {share:.1%}' for name, share in shares.items())} (by chance {self.chance[-1]:.1%})."
        )
        losses = () if self.losses is None else self.losses.findings()
        return (Sentence(text, kind="energies"), *losses)


@dataclass(frozen=True, repr=False, eq=False)
class BandLosses(Result):
    """What filtering each band from the last residual stream costs.

    Attributes:
        delta_loss: [bands, prompts], nats per token.
        random: [bands, prompts], the same of as many random directions: bands of a random rotation.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
        seed: of the bootstrap.
    """

    delta_loss: np.ndarray = field(repr=False)
    random: np.ndarray = field(repr=False)
    tokens: tuple[int, ...]
    bos: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per band: `delta_loss` with `low` and `high` (95 % over prompts), and `control` with `control_low` and
        `control_high`, of as many random directions."""
        found = {"band": range(len(self.delta_loss))}
        found |= columns("delta_loss", self.delta_loss, self.seed, plain=True, shares=False)
        found |= columns("control", self.random, self.seed, shares=False)
        return pd.DataFrame(found).assign(bos=self.bos, n=len(self.tokens))

    def findings(self) -> tuple[Sentence, ...]:
        """The dearest band and the weakest, and what is not in these numbers."""
        table = self.table()
        most, dark = table.sort_values("delta_loss").iloc[-1], table.iloc[-1]
        said = (
            f"Without band {most['band']} of {len(table)} the loss rises most, by "
            f"{_told(most, len(table))}; without the weakest by {_told(dark)} "
            f"({len(self.tokens)} prompts, BOS {self.bos})."
        )
        low, _ = of_many(
            most["delta_loss"], most["low"], most["high"], len(table), len(self.tokens)
        )
        if not low > 0 and not (np.isnan(low) and most["delta_loss"] > 0):
            said = (
                f"Without none of {len(table)} bands the loss is told to rise; without the weakest it changes "
                f"by {_told(dark)} ({len(self.tokens)} prompts, BOS {self.bos})."
            )
        limit = (
            "Only the stream before the last norm was filtered: what earlier layers read of a band is not "
            "in these numbers."
        )
        return (Sentence(said, kind="losses"), Sentence(limit, kind="limit"))


def _told(row: Any, many: int = 1) -> str:
    """What a band, the dearest of `many`, is worth, beside as many random directions."""
    return (
        f"{of_many_told(row, 'delta_loss', '.3f', many, row['n'], plain=True)} nats per token, without as many random directions "
        f"by {with_ends(row, 'control', '.3f')}"
    )


def bands(
    model: LoadedModel,
    prompts: Any = None,
    *,
    count: int = BANDS,
    seed: Seed = 0,
    progress: bool = True,
) -> SpectralBands:
    """SVD of the unembedding (the last norm's scale folded in), cut into equal bands.

    With the share of every head's weights in each band and, on prompts, the change of loss with each
    band projected out of the stream before the last norm, beside as many random directions.

    Reference: Cancedda, Spectral Filters, Dark Signals, and Attention Sinks, arXiv 2402.09221.

    Args:
        model: a language model whose weights are known to `lens.heads`; causal where prompts are given.
        prompts: as for `lens.capture`, token prompts; None: weights alone.
        count: number of bands.
        seed: of the random directions and of the bootstrap.
        progress: show a bar.

    Raises:
        LensError: a count that is none, prompts of one token, an architecture whose weights are not known.

    Example:
        >>> found = lens.sinks.bands(model, texts, count=4)
        >>> found.table().query("weight == 'output'").groupby("band").energy.mean(), found.losses.table()
    """
    weights = head_weights(model)
    unembedding = weights.unembedding.double()  # [d_model, vocab]
    width = len(unembedding)
    if not is_whole(count) or not 1 <= count <= width:
        raise LensError(f"count must be 1 to {width} (the width of the model), got {count!r}")
    values, vectors = torch.linalg.eigh(unembedding @ unembedding.T)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    edges = tuple(int(edge) for edge in np.linspace(0, width, count + 1).round())
    share = np.array([float(values[a:b].sum()) for a, b in itertools.pairwise(edges)])
    tables = []
    for name in ("query", "key", "value", "output"):
        for layer, heads in enumerate(getattr(weights, name)):
            for head, weight in enumerate(heads):
                reading = weight.T if name == "output" else weight
                energy = _energies(vectors, edges, reading)
                names = head_columns([(layer, head)] * count) | {"weight": name}
                tables.append(pd.DataFrame(names | {"band": range(count), "energy": energy}))
    table = pd.concat(tables, ignore_index=True)
    found = SpectralBands(vectors, edges, share / share.sum(), table)
    if prompts is None:
        return found
    losses = _losses(model, prompts, found, seed, progress)
    return replace(found, losses=losses)


def _energies(vectors: torch.Tensor, edges: tuple[int, ...], weight: torch.Tensor) -> np.ndarray:
    """[bands]: share of `|W|_F^2` in each band, of [d_model, other]; they sum to 1."""
    squared = (vectors.T @ weight.double()).square().sum(1)
    parts = np.array([float(squared[a:b].sum()) for a, b in itertools.pairwise(edges)])
    return parts / parts.sum()


def _losses(
    model: LoadedModel, prompts: Any, found: SpectralBands, seed: int, progress: bool
) -> BandLosses:
    from lens.tasks.prompts import loss

    asked, layout, deltas = read_prompts(model, prompts)[0], proved(model), []
    read = [two_tokens(prompt.ids) for prompt in asked]
    model, norm, count = layout.model, layout.final_norm.module, len(found.share)
    assert norm is not None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(found.vectors.shape, generator=generator, dtype=torch.float64)
    rotated = replace(found, vectors=torch.linalg.qr(drawn).Q)
    with advancing("bands", 2 * len(read) * count, progress) as advance:
        for ids in read:
            plain, row = loss(model, ids), []
            for one in (found, rotated):
                for band in range(count):
                    projector = one.projector(band).to(model.device, model.dtype)
                    with norm.register_forward_pre_hook(
                        lambda _, args, out=projector: (args[0] - args[0] @ out, *args[1:])
                    ):
                        row.append(loss(model, ids) - plain)
                    advance(1)
            deltas.append(row)
    own, random = np.array(deltas).T.reshape(2, count, len(read))
    lengths = tuple(len(ids) for ids in read)
    return BandLosses(own, random, lengths, bos_policy(model, read), seed)
