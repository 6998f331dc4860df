"""Which tokens of a sequence each process holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Order: TypeAlias = Literal["zigzag", "contiguous"]
_ORDERS = ("zigzag", "contiguous")
Pieces: TypeAlias = Sequence[tuple[int, int]]


def runs(pieces: Pieces) -> Iterator[tuple[int, int, slice]]:
    """(start, stop) of each run of tokens, and where it lies among the tokens of all runs."""
    at = 0
    for start, stop in pieces:
        yield start, stop, slice(at, at + stop - start)
        at += stop - start


def blocks_of(pieces: Pieces, block: int) -> int:
    """Blocks of some runs of tokens, each of which begins at one."""
    return sum(-(-(stop - start) // block) for start, stop in pieces)


@dataclass(frozen=True)
class Layout:
    """A sequence cut at blocks and dealt out to ranks.

    Under a causal mask late tokens see more keys. With "zigzag" the sequence is cut into `2 * ranks` pieces
    and rank `r` holds pieces `r` and `2 * ranks - 1 - r`, so that all have the same work; with
    "contiguous" it holds one piece, and the last rank has most of it.

    Attributes:
        length: tokens of the whole sequence.
        ranks: number of processes.
        block: pieces begin at multiples of it.
        order: "zigzag" or "contiguous".

    Raises:
        ValueError: fewer blocks than pieces, or numbers that cannot be.

    Example:
        >>> Layout(10, 2, block=2).pieces(0)
        ((0, 2), (6, 10))
    """

    length: int
    ranks: int
    block: int = 1
    order: Order = "zigzag"

    def __post_init__(self) -> None:
        for name in ("length", "ranks", "block"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        if self.order not in _ORDERS:
            raise ValueError(f"order must be one of {', '.join(_ORDERS)}, got {self.order!r}")
        count, blocks = self._count, -(-self.length // self.block)
        if blocks < count:
            raise ValueError(
                f"{self.length} tokens in blocks of {self.block} are {blocks} blocks, and {self.ranks} "
                f"processes need {count}; use smaller blocks or fewer processes"
            )

    @property
    def _count(self) -> int:
        return (2 if self.order == "zigzag" and self.ranks > 1 else 1) * self.ranks

    def _piece(self, number: int) -> tuple[int, int]:
        blocks, count = -(-self.length // self.block), self._count
        bounds = (number * blocks // count, (number + 1) * blocks // count)
        return bounds[0] * self.block, min(bounds[1] * self.block, self.length)

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the runs of tokens that a rank holds, in order."""
        if self._count == self.ranks:
            return (self._piece(rank),)
        return self._piece(rank), self._piece(self._count - 1 - rank)

    def local(self, rank: int) -> tuple[slice, ...]:
        """Where each of `pieces` lies among the rank's own tokens."""
        return tuple(place for *_, place in runs(self.pieces(rank)))

    def size(self, rank: int, block: int = 1) -> int:
        """Tokens that a rank holds, or blocks of them."""
        return blocks_of(self.pieces(rank), block)

    def positions(self, rank: int) -> Tensor:
        """[size], positions of the rank's tokens in the sequence."""
        return torch.cat([torch.arange(*piece, device="cpu") for piece in self.pieces(rank)])

    def take(self, whole: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's part of a tensor with one entry per token along `dim`."""
        parts = [whole.narrow(dim, start, stop - start) for start, stop in self.pieces(rank)]
        return torch.cat(parts, dim)

    def join(self, parts: Sequence[Tensor], dim: int, block: int = 1) -> Tensor:
        """The whole of what every rank has, with one entry per `block` tokens along `dim`."""
        pieces = []
        for rank, part in enumerate(parts):
            at = 0
            for start, stop in self.pieces(rank):
                size = -(-(stop - start) // block)
                pieces.append((start, part.narrow(dim, at, size)))
                at += size
        return torch.cat([part for _, part in sorted(pieces, key=lambda pair: pair[0])], dim)

    def work(self, rank: int, *, causal: bool = True, window: int | None = None) -> int:
        """Pairs of a query of the rank and a key that it sees."""
        reach = self.length if window is None else window
        position = self.positions(rank)
        before = (position + 1).clamp(max=reach)
        if causal:
            return int(before.sum())
        after = (self.length - position).clamp(max=reach)
        return int((before + after - 1).sum())
