"""Phi of a mixer: the matrix with `y = Phi v`, of which any tile can be had and nothing more is held.

Entries may be negative and rows need not sum to 1. Decays are kept as sums of logarithms and only differences
that are at most 0 are raised, so that decays of 30 nats a step give no infinities. All in float64.

Reference: Sieber et al., Understanding the differences in foundation models, 2024, arXiv 2405.15731.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.common.choices import check_counts, check_range

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 64
_ENTRIES = 1 << 22  # of a sum over channels that is spelled out


@dataclass(frozen=True, eq=False)
class Phi(ABC):
    """One mixer's matrix, [heads, tokens, tokens], zero above the diagonal.

    Attributes:
        value: [heads, tokens, value_dim], what it is multiplied with.
        half_lives: [heads], median over tokens (and channels) of the tokens after which a weight has halved by decay
            alone; inf without decay, NaN where there is no such thing.
        diagonal: [heads, tokens], in the place of the diagonal (RWKV); None: as the formula has it.
        skip: [heads], added to the diagonal (D of Mamba), or None.
    """

    value: Float[Tensor, "heads tokens dim"]
    half_lives: Float[Tensor, "heads"] = field(kw_only=True)
    diagonal: Float[Tensor, "heads tokens"] | None = field(default=None, kw_only=True)
    skip: Float[Tensor, "heads"] | None = field(default=None, kw_only=True)

    @property
    def heads(self) -> int:
        """Number of heads; of channels where each has its own matrix."""
        return self.value.shape[0]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.value.shape[1]

    @abstractmethod
    def _strip(
        self, first: int, last: int, block: int
    ) -> Iterator[tuple[int, int, Float[Tensor, "heads rows columns"]]]:
        """(first row, past the last, tile) of the columns first..last, from the block of their first row down."""

    def _blocks(self, first: int, block: int) -> Iterator[tuple[int, int]]:
        """(first row, past the last) of the blocks of rows, from the one that holds row `first` on."""
        for start in range(first // block * block, self.length, block):
            yield start, min(start + block, self.length)

    def strip(self, first: int, last: int, block: int = BLOCK) -> Iterator[tuple[int, int, Tensor]]:
        """The columns first..last in tiles of `block` rows, from the block that holds row `first` on.

        Yields:
            First row, past the last row, and [heads, rows, columns] with diagonal and skip.
        """
        for start, end, tile in self._strip(first, last, block):
            same = torch.arange(start, end)[:, None] == torch.arange(first, last)
            if self.diagonal is not None:
                tile = torch.where(same, self.diagonal[:, start:end, None], tile)
            if self.skip is not None:
                tile = tile + same * self.skip[:, None, None]
            yield start, end, tile

    def tile(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Any rectangle, [heads, rows, columns].

        Args:
            rows, columns: ranges (first, past the last).

        Raises:
            LensError: a range that leaves the tokens.
        """
        rows = check_range("rows", rows, self.length)
        columns = check_range("columns", columns, self.length)
        found = self.value.new_zeros(self.heads, rows[1] - rows[0], columns[1] - columns[0])
        for start, end, tile in self.strip(*columns):
            low, high = max(start, rows[0]), min(end, rows[1])
            if low < high:
                found[:, low - rows[0] : high - rows[0]] = tile[:, low - start : high - start]
            if end >= rows[1]:
                break
        return found

    def output(self, block: int = BLOCK) -> Tensor:
        """`Phi v`, [heads, tokens, value_dim], tile by tile."""
        check_counts(block=block)
        found = torch.zeros_like(self.value)
        for first in range(0, self.length, block):
            last = min(first + block, self.length)
            for start, end, tile in self.strip(first, last, block):
                found[:, start:end] += tile @ self.value[:, first:last]
        return found

    def row_sums(self) -> Tensor:
        """[heads, tokens], with their sign."""
        ones = torch.ones(*self.value.shape[:2], 1, dtype=self.value.dtype)
        return replace(self, value=ones).output()[..., 0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.heads} heads, {self.length:,} tokens)"


@dataclass(frozen=True, eq=False, repr=False)
class ScalarDecay(Phi):
    """`Phi_ij = q_i . k_j exp(above_i - below_j)` for j <= i: one decay a head, `above - below` at most 0 there.

    Attributes:
        query, key: [heads, tokens, dim].
        above, below: [heads, tokens], logarithms of what rows and columns are weighted with.
        scale: [heads, tokens], rows are multiplied by it; None: 1.
    """

    query: Tensor
    key: Tensor
    above: Tensor
    below: Tensor
    scale: Tensor | None = None

    def _strip(self, first: int, last: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
        column = torch.arange(first, last)
        for start, end in self._blocks(first, block):
            row = torch.arange(start, end)[:, None]
            above, below = self.above[:, start:end, None], self.below[:, None, first:last]
            weight = (above - below).masked_fill(column > row, -math.inf).exp()
            tile = self.query[:, start:end] @ self.key[:, first:last].transpose(-1, -2) * weight
            if self.scale is not None:
                tile = tile * self.scale[:, start:end, None]
            yield start, end, tile


@dataclass(frozen=True, eq=False, repr=False)
class VectorDecay(Phi):
    """`Phi_ij = sum_c q_ic k_jc exp(above_ic - below_jc)` for j <= i: each channel of the state decays by itself.

    Attributes:
        query, key: [heads, tokens, dim].
        above, below: [heads, tokens, dim], running sums of the decay's logarithm; `above` is `below`, or what it was one
            token before (RWKV-6 adds a token after it was read).
    """

    query: Tensor
    key: Tensor
    above: Tensor
    below: Tensor

    def _strip(self, first: int, last: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
        column = torch.arange(first, last)
        for start, end in self._blocks(first, block):
            row = torch.arange(start, end)[:, None]
            if last <= start:  # both exponents at most 0 about the token before the rows
                base = self.below[:, start - 1 : start]
                query = self.query[:, start:end] * (self.above[:, start:end] - base).exp()
                key = self.key[:, first:last] * (base - self.below[:, first:last]).exp()
                tile = query @ key.transpose(-1, -2)
            else:
                tile = _summed(
                    self.query[:, start:end],
                    self.key[:, first:last],
                    self.above[:, start:end],
                    self.below[:, first:last],
                ).masked_fill(column > row, 0)
            yield start, end, tile


def _summed(query: Tensor, key: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """[heads, rows, columns] with the sum over channels spelled out, some rows at a time; what lies above the
    diagonal is finite and says nothing.

    Args:
        query, key: [heads, rows, dim] and [heads, columns, dim].
        above, below: of each, as in `VectorDecay`; of all channels alike where the last axis is 1.
    """
    heads, columns, dim = key.shape
    step = max(1, _ENTRIES // (heads * dim * columns))
    found = []
    for some, decayed in zip(query.split(step, 1), above.split(step, 1), strict=True):
        weight = (decayed[:, :, None] - below[:, None]).clamp(max=0).exp()
        found.append((some[:, :, None] * key[:, None] * weight).sum(-1))
    return torch.cat(found, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Delta(Phi):
    """The delta rule, `S_i = e^{g_i} S_{i-1} + beta_i k_i (v_i - k_i . e^{g_i} S_{i-1})`, `y_i = q_i S_i`.

    With E the decays between two tokens, `Phi = tril(Q K' E) (I + beta stril(K K' E))^{-1} beta`. A block of columns
    is carried down row by row of blocks in `dim` numbers a column.

    Attributes:
        query, key: [heads, tokens, dim].
        beta: [heads, tokens].
        decay: [heads, tokens, 1 or dim], its logarithm at each token, at most 0.
    """

    query: Tensor
    key: Tensor
    beta: Tensor
    decay: Tensor

    def _strip(self, first: int, last: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
        heads, _, dim = self.key.shape
        state = self.key.new_zeros(heads, dim, last - first)  # S = state v of the columns
        for start, end in self._blocks(first, block):
            query, key, beta = (one[:, start:end] for one in (self.query, self.key, self.beta))
            total = self.decay[:, start:end].cumsum(1)
            seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            between = _summed(key, key, total, total).masked_fill(~seen.tril(-1), 0)
            mixed = beta[..., None] * between
            system = mixed + torch.eye(end - start, dtype=key.dtype)
            same = torch.arange(start, end)[:, None] == torch.arange(first, last)
            own = beta[..., None] * same
            kept = (key * total.exp()) @ state
            written = torch.linalg.solve_triangular(
                system, own - beta[..., None] * kept, upper=False, unitriangular=True
            )
            read = _summed(query, key, total, total).masked_fill(~seen, 0)
            yield start, end, (query * total.exp()) @ state + read @ written
            left = (total[:, -1:] - total).exp()
            state = total[:, -1:].exp().transpose(-1, -2) * state
            state = state + (key * left).transpose(-1, -2) @ written


@dataclass(frozen=True, eq=False, repr=False)
class Band(Phi):
    """A short causal convolution between two gates: `Phi_ij = out_i w_(i-j) in_j` for i - j below the width.

    Attributes:
        out, into: [heads, tokens], gates after and before it.
        weight: [heads, width], of each distance from 0.
    """

    out: Tensor
    into: Tensor
    weight: Tensor

    def _strip(self, first: int, last: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
        width = self.weight.shape[1]
        for start, end in self._blocks(first, block):
            distance = torch.arange(start, end)[:, None] - torch.arange(first, last)
            inside = (distance >= 0) & (distance < width)
            weight = self.weight[:, distance.clamp(0, width - 1)] * inside
            yield start, end, self.out[:, start:end, None] * weight * self.into[:, None, first:last]


@dataclass(frozen=True, eq=False, repr=False)
class Stepwise(Phi):
    """Any recurrence that is linear in v, run over the columns of the unit matrix, token by token.

    Attributes:
        begin: (columns) -> state.
        step: (state, token, unit [heads, columns]) -> (state, row of Phi [heads, columns]).
    """

    begin: Callable[[int], Tensor]
    step: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]

    def _strip(self, first: int, last: int, block: int) -> Iterator[tuple[int, int, Tensor]]:
        state = self.begin(last - first)
        unit = torch.eye(last - first, dtype=self.value.dtype).expand(self.heads, -1, -1)
        nothing = torch.zeros_like(unit[:, 0])
        for start, end in self._blocks(first, block):
            rows = []
            for token in range(start, end):
                if token < first:  # nothing was written yet
                    rows.append(nothing)
                    continue
                given = unit[:, token - first] if token < last else nothing
                state, row = self.step(state, token, given)
                rows.append(row)
            yield start, end, torch.stack(rows, 1)


def joined(phis: Sequence[Phi]) -> Phi:
    """Several matrices of one kind and length as one with all their heads."""
    first = phis[0]
    several = {
        one.name: torch.cat([getattr(phi, one.name) for phi in phis])
        for one in fields(first)
        if isinstance(getattr(first, one.name), Tensor)
    }
    return replace(first, **several)
