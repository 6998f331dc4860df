"""What all policies have in common: a small frozen object that chooses blocks of keys for blocks of queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lens.common import choices
from lens.common.choices import is_number
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, in_blocks


@dataclass(frozen=True, eq=False)
class Kept:
    """What a policy chose.

    Attributes:
        blocks: bool [batch, heads, query_blocks, key_blocks]; blocks that nobody sees count nothing.
        predicted: [batch, heads], the share of the mass that the policy itself expects to keep, or None
            where it makes no such claim.
    """

    blocks: Tensor
    predicted: Tensor | None = None


class Policy(ABC):
    """Which blocks of keys each block of queries may see.

    Attributes:
        block_size: (query_block, key_block) of the published policy, tokens: the default of `evaluate`.
        decodes: whether it also chooses for a single query with cached keys; where it does not, decoding
            stays dense, as published.
        is_reference: a bound or a baseline, which no serving engine would run.
    """

    block_size: tuple[int, int] = (64, 64)
    decodes: bool = True
    is_reference: bool = False

    @abstractmethod
    def keep(self, view: BlockView) -> Kept:
        """The blocks that stay.

        Args:
            view: of a call; its attributes give q, k, the mask and probes of P.
        """

    def check(self, model: LoadedModel) -> None:
        """Raises LensError where this policy, or one inside it, names heads that the model has not got."""
        for one in fields(self):  # type: ignore[arg-type]  # every policy is a dataclass
            if isinstance(inside := getattr(self, one.name), Policy):
                inside.check(model)

    def choose(self, view: BlockView) -> Kept:
        """`keep`; every block where a single query decodes and this policy has no form for that."""
        one_token = view.queries == 1 and view.offset > 0
        return Full().keep(view) if one_token and not self.decodes else self.keep(view)

    def cost(self, view: BlockView) -> float:
        """Products q·k that choosing takes, as a share of those of dense causal attention; 0 where none."""
        return 0.0

    def __str__(self) -> str:
        """The name with every number that is not the default."""
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)  # type: ignore[arg-type]  # every policy is a dataclass
            if getattr(self, one.name) != one.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


@dataclass(frozen=True)
class Full(Policy):
    """Every block: dense attention.

    Example:
        >>> str(lens.policies.Full())
        'Full()'
    """

    is_reference = True

    def keep(self, view: BlockView) -> Kept:
        """See `Policy`."""
        ones = torch.ones(view.shape, dtype=torch.bool, device=view.query.device)
        return Kept(ones, ones.new_ones(view.shape[:2], dtype=torch.float32))


def pairs(view: BlockView) -> float:
    """Pairs of a query and a key that dense attention looks at in one head, from the visible blocks."""
    return float(view.visible[0, 0].sum()) * view.query_block * view.key_block


def pooling_cost(view: BlockView) -> float:
    """One product for each visible pair of blocks, as a share of the dense ones."""
    return float(view.visible[0, 0].sum()) / pairs(view)


def by_distance(view: BlockView, kept: Tensor) -> Tensor:
    """bool [..., query_blocks, key_blocks] with one pair at a kept distance.

    Args:
        kept: bool [..., keys], by query position less key position; by its size where rows see later keys.
    """
    row, last = _rows(view)
    column = torch.arange(view.shape[3], device=kept.device) * view.key_block
    return _between(view, kept, row - (column + view.key_block - 1), last - column)


def by_band(view: BlockView, kept: Tensor) -> Tensor:
    """bool [..., query_blocks, key_blocks] that lie a kept number of key blocks before the own one of some row.

    Args:
        kept: bool [..., key_blocks], by that number; also after it where rows see later keys.
    """
    row, last = _rows(view)
    column = torch.arange(view.shape[3], device=kept.device)
    return _between(view, kept, row // view.key_block - column, last // view.key_block - column)


def _rows(view: BlockView) -> tuple[Tensor, Tensor]:
    """[query_blocks, 1]: positions of the first and the last row of each block."""
    row = torch.arange(view.shape[2], device=view.query.device)[:, None] * view.query_block
    row = row + view.offset
    return row, (row + view.query_block).clamp(max=view.keys) - 1


def _between(view: BlockView, kept: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """bool [..., query_blocks, key_blocks]: a number from `low` to `high` is kept, or from -`high` to -`low` where
    rows see later keys."""
    count = kept.shape[-1]
    before = torch.nn.functional.pad(kept.cumsum(-1), (1, 0))  # [..., count + 1]
    ways = [(low, high), (-high, -low)] if view.looks_ahead else [(low, high)]
    found = [
        before[..., (to + 1).clamp(0, count)] > before[..., of.clamp(0, count)] for of, to in ways
    ]
    return found[0] | found[-1]


def by_key(view: BlockView, kept: Tensor) -> Tensor:
    """bool [..., 1, key_blocks] with one kept key, from bool [..., keys]."""
    return in_blocks(kept, view.key_block).any(-1)[..., None, :]


def ends(view: BlockView, *, before: int = 0, first: int = 1) -> Tensor:
    """The first blocks, those of the query block itself, and so many before them; visible ones only."""
    at = torch.arange(view.shape[3], device=view.query.device)
    start, end = _rows(view)
    own = (at >= start // view.key_block - before) & (at <= end // view.key_block)
    return ((at < first) | own) & view.visible


def largest(scores: Tensor, count: Tensor | int, among: Tensor) -> Tensor:
    """bool of the `count` largest `scores` [..., n] among those that may be taken; all where these are fewer.

    Of equal ones the first are taken.

    Args:
        count: number, or [..., 1] of each row.
    """
    order = (
        scores.float().masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    )
    place = torch.empty_like(order)
    numbers = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    place.scatter_(-1, order, numbers)
    return (place < count) & among


def covering(shares: Tensor, needed: Tensor | float, *, over: bool = True) -> Tensor:
    """bool of the fewest largest `shares` [..., n] whose sum reaches `needed`.

    Args:
        shares: not negative.
        needed: a number or [..., 1].
        over: the one that reaches it is taken too; without, the sum does not pass `needed`.
    """
    ordered = shares.sort(dim=-1, descending=True, stable=True)
    total = ordered.values.cumsum(-1)
    taken = (total - ordered.values < needed) if over else (total <= needed)
    taken = taken & (ordered.values > 0)
    return torch.zeros_like(taken).scatter(-1, ordered.indices, taken)


def several(name: str, given: Any) -> list[Policy]:
    """One policy or several as a list.

    Raises:
        LensError: none, or something else among them.
    """
    found: list[Policy] = []
    for one in given if isinstance(given, Iterable) and not isinstance(given, str) else [given]:
        if not isinstance(one, Policy):
            raise LensError(
                f"{name} must be one of lens.policies, such as AShape(64, 256), got {type(one).__name__}"
            )
        found.append(one)
    if not found:
        raise LensError(f"{name} is an empty list; give at least one policy")
    return found


def check_counts(policy: Policy, *names: str, least: int = 0) -> None:
    """Raises LensError unless these fields are integers of `least` or more."""
    kind = type(policy).__name__
    choices.check_counts(least, **{f"{name} of {kind}": getattr(policy, name) for name in names})


def check_shares(policy: Policy, *names: str, zero: bool = False) -> None:
    """Raises LensError unless these fields are numbers above 0 (`zero`: from 0 on) and at most 1."""
    for name in names:
        value = getattr(policy, name)
        if not is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero):
            raise LensError(
                f"{name} of {type(policy).__name__} must be {'from 0 on' if zero else 'above 0'} and at most 1, got {value!r}"
            )
