"""What the heads of a mixer do, from Phi tile by tile: masses with their sign, distances, decay, rank.

A row of Phi may be negative and need not sum to 1, so there are two masses: `sum_j Phi_ij` with its sign and `Z_i =
sum_j |Phi_ij|`. What stands beside softmax attention (entropy, distance, the first key's share) is of `|Phi| / Z`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import Count
from lens.common.errors import LensError
from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence, ends
from lens.mixers.phi import BLOCK, Phi
from lens.passes.check import relative_error
from lens.stats import over_rows
from lens.stats.intervals import known_mean

_TILES = 8  # below the diagonal, whose rank is taken
_ROWS = ("mass", "entropy", "distance", "first_share")


@dataclass(frozen=True, repr=False, eq=False)
class MixerMeasures(Result):
    """The heads of one mixer on one prompt.

    Attributes:
        rows: name -> [heads, tokens]: "mass" (with its sign), "size" (Z), "negative" (mass below 0, as a positive
            number), and of |Phi| / Z "entropy", "distance" and "first_share" (the first key's), NaN where Z is 0.
        block_mass, block_size: [heads, blocks, blocks] mean over the rows of a block of the mass, and of its absolute
            value, that lies on a block of keys.
        profile, profile_size: [heads, tokens] mean over queries of Phi and |Phi| at each distance.
        half_life: [heads], tokens; inf without decay, NaN where there is no such thing.
        rank: [heads] effective rank, exp of the entropy of the singular values, mean over tiles below the diagonal;
            NaN where the prompt has no such tile.
        largest_rank: [heads], the same as whole numbers: singular values above 1e-9 of the largest, the most of any tile.
        check: largest difference of Phi v from the layer's own output, over its largest value; NaN where it is unknown.
        layer, kind: number of the layer and name of the mixer.
    """

    rows: dict[str, np.ndarray]
    block_mass: np.ndarray
    block_size: np.ndarray
    profile: np.ndarray
    profile_size: np.ndarray
    half_life: np.ndarray
    rank: np.ndarray
    largest_rank: np.ndarray
    check: float
    layer: int
    kind: str

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.half_life)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `mixer`, and means over the rows of the prompt.

        `mass`, `entropy`, `distance` and `first_share` with `_low` and `_high`, 95 % bootstrap over blocks of rows;
        `negative_share` of all absolute mass; `half_life`, `rank`, `check`.
        """
        found: dict[str, Any] = head_columns((self.layer, head) for head in range(self.heads))
        found["mixer"] = self.kind
        for name in _ROWS:
            values = self.rows[name]
            low, high = over_rows(values, seed)
            found[name] = known_mean(values)
            found |= {f"{name}_low": low, f"{name}_high": high}
        size = self.rows["size"].sum(-1)
        found["negative_share"] = self.rows["negative"].sum(-1) / np.where(size > 0, size, np.nan)
        return pd.DataFrame(
            found | {"half_life": self.half_life, "rank": self.rank, "check": self.check}
        )

    def findings(self) -> tuple[Sentence, ...]:
        """How much is negative, how far heads look, and whether Phi v is the layer's output."""
        table = self.table()
        distance = table["distance"].to_numpy()
        far = None if np.isnan(distance).all() else table.iloc[int(np.nanargmax(distance))]
        said = [
            Sentence(
                f"{self.kind} of layer {self.layer}: {table['negative_share'].mean():.0%} of the absolute mass of "
                f"its {self.heads} heads is negative.",
                kind="sign",
            )
        ]
        if far is not None:
            said.append(
                Sentence(
                    f"{far['name']} looks furthest: {far['distance']:.3g} tokens back on "
                    f"average{ends(far['distance_low'], far['distance_high'])}.",
                    kind="distance",
                )
            )
        if not np.isnan(self.check):
            said.append(
                Sentence(
                    f"Phi v is the layer's own output to {self.check:.0e} of its largest value.",
                    kind="check",
                )
            )
        return tuple(said)


def measure(
    phi: Phi,
    output: torch.Tensor | None = None,
    *,
    layer: int = 0,
    kind: str = "mixer",
    block: Count = BLOCK,
) -> MixerMeasures:
    """All measures of a mixer in one walk over the tiles of its Phi.

    Args:
        phi: as the functions of `lens.mixers` make it.
        output: [heads, tokens, value_dim], what the layer itself gave, to hold `Phi v` against.
        layer, kind: for tables.
        block: tokens a side of the tiles and of the maps.

    Raises:
        LensError: no `Phi`, an output of another shape, or a block size that is none.

    Example:
        >>> q, k, v = torch.randn(3, 2, 40, 4)
        >>> lens.mixers.measure(lens.mixers.linear(q, k, v)).table()["negative_share"].between(0, 1).tolist()
        [True, True]
    """
    if not isinstance(phi, Phi):
        raise LensError(
            f"measure takes a Phi, as lens.mixers.linear makes it, got {type(phi).__name__}"
        )
    if output is not None and output.shape != phi.value.shape:
        raise LensError(
            f"output must be {list(phi.value.shape)}, as the values are, got {list(output.shape)}"
        )
    walk = _Walk(phi, block)
    for first in range(0, phi.length, block):
        last = min(first + block, phi.length)
        for start, end, tile in phi.strip(first, last, block):
            walk.take(start, end, first, last, tile)
    check = np.nan
    if output is not None:
        check = relative_error(walk.output, output.detach().double().cpu())
    return walk.found(layer, kind, check)


class _Walk:
    """Sums over tiles."""

    def __init__(self, phi: Phi, block: int) -> None:
        self._phi, self._block = phi, block
        heads, length = phi.heads, phi.length
        blocks = -(-length // block)
        self.output = torch.zeros_like(phi.value)
        self._sums = torch.zeros(6, heads, length, dtype=torch.float64)
        self._maps = torch.zeros(2, heads, blocks, blocks, dtype=torch.float64)
        self._profile = torch.zeros(2, heads, length, dtype=torch.float64)
        self._ranks: list[torch.Tensor] = []
        self._most: list[torch.Tensor] = []

    def take(self, start: int, end: int, first: int, last: int, tile: torch.Tensor) -> None:
        """One tile [heads, rows, columns]."""
        size = tile.abs()
        distance = torch.arange(start, end)[:, None] - torch.arange(first, last)
        rows = slice(start, end)
        self.output[:, rows] += tile @ self._phi.value[:, first:last]
        parts = [tile, size, tile.clamp(max=0).neg(), torch.special.entr(size), size * distance]
        for number, part in enumerate(parts):
            self._sums[number, :, rows] += part.sum(-1)
        if first == 0:
            self._sums[5, :, rows] = size[..., 0]
        place = start // self._block, first // self._block
        for number, part in enumerate((tile, size)):
            self._maps[number, :, *place] = part.sum((1, 2)) / (end - start)
            kept = distance >= 0
            self._profile[number].index_add_(1, distance[kept], part[:, kept])
        whole = tile.shape[-2:] == (self._block, self._block)
        if first + self._block <= start and whole and len(self._ranks) < _TILES:
            values = torch.linalg.svdvals(tile)
            share = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
            self._ranks.append(torch.special.entr(share).sum(-1).exp())
            self._most.append((values > 1e-9 * values[:, :1]).sum(-1).double())

    def found(self, layer: int, kind: str, check: float) -> MixerMeasures:
        """The measures."""
        mass, size, negative, entropy, distance, first = self._sums
        z = torch.where(size > 0, size, torch.nan)
        queries = torch.arange(self._phi.length, 0, -1)
        unknown = torch.full((self._phi.heads,), torch.nan, dtype=torch.float64)
        ranks = torch.stack(self._ranks).mean(0) if self._ranks else unknown
        most = torch.stack(self._most).amax(0) if self._most else unknown
        rows = {
            "mass": mass,
            "size": size,
            "negative": negative,
            "entropy": z.log() + entropy / z,
            "distance": distance / z,
            "first_share": first / z,
        }
        return MixerMeasures(
            rows={name: one.numpy() for name, one in rows.items()},
            block_mass=self._maps[0].numpy(),
            block_size=self._maps[1].numpy(),
            profile=(self._profile[0] / queries).numpy(),
            profile_size=(self._profile[1] / queries).numpy(),
            half_life=self._phi.half_lives.numpy(),
            rank=ranks.numpy(),
            largest_rank=most.numpy(),
            check=check,
            layer=layer,
            kind=kind,
        )
