"""Attention of some runs of queries to some runs of keys of a longer sequence: one state, or sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lens_kernels.api import run_problem
from lens_kernels.distributed.layout import Pieces, blocks_of, runs
from lens_kernels.known_lse import known_sums
from lens_kernels.problem import MaskPlan, Problem
from lens_kernels.states import AttentionState, merge, seen_rows
from lens_kernels.validation import make_problem

_INF = float("inf")
OF_GROUPS = ("max_logit", "entropy", "concentration", "distance")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is computed of every pair of pieces."""

    length: int
    causal: bool
    window: int | None
    scale: float | None
    softcap: float | None
    block: int
    rows: frozenset[str]  # statistics of rows that states carry
    sums: frozenset[str]  # over rows
    prefix: int
    group_count: int
    backend: str

    @property
    def distances(self) -> int:
        """Of the whole sequence."""
        return self.length if self.causal else 2 * self.length - 1


@dataclass(frozen=True, eq=False)
class Queries:
    """Some tokens' queries [batch, heads, tokens, dim], and their labels [batch, tokens, pairs]."""

    query: Tensor
    labels: Tensor | None
    pieces: Pieces


@dataclass(frozen=True, eq=False)
class Keys:
    """Some tokens' keys and values, labels [batch, tokens, pairs] and groups [batch, tokens]."""

    key: Tensor
    value: Tensor
    labels: Tensor | None
    groups: Tensor | None
    pieces: Pieces


@dataclass(frozen=True, eq=False)
class _Pair:
    """One piece of queries and one of keys, of which some see each other."""

    problem: Problem
    rows: slice  # among the queries' tokens
    columns: slice  # among the keys' tokens
    shift: int  # true distance minus that of the problem
    groups: Tensor | None  # [batch, keys]


def _plan(
    asked: Asked, rows: tuple[int, int], keys: tuple[int, int], like: Tensor
) -> MaskPlan | None:
    """Which of the keys each row sees; None where none sees any."""
    count = keys[1] - keys[0]
    place = torch.arange(*rows, dtype=torch.int32, device=like.device) - keys[0]
    low, high = torch.zeros_like(place), torch.full_like(place, count)
    if asked.causal:
        high = (place + 1).clamp(0, count)
    if asked.window is not None:
        low = (place - asked.window + 1).clamp(0, count)
        if not asked.causal:
            high = torch.minimum(high, (place + asked.window).clamp(0, count))
    seen = high > low
    if not bool(seen.any()):
        return None
    shape = (len(like), -1)
    index = torch.arange(count, dtype=torch.int32, device=like.device)
    row = torch.arange(rows[1] - rows[0], dtype=torch.int32, device=like.device)
    return MaskPlan(
        low=torch.where(seen, low, 0).expand(shape).contiguous(),
        high=torch.where(seen, high, 0).expand(shape).contiguous(),
        anchor=(row + count - len(row)).expand(shape).contiguous(),
        key_position=(index + keys[0]).expand(shape).contiguous(),
        keep=None,
        allowed=None,
        bias=None,
        slopes=None,
        causal=False,
        simple=False,
        window=None,
        offset=count - len(row),
    )


def _pairs(asked: Asked, queries: Queries, keys: Keys, names: frozenset[str]) -> Iterator[_Pair]:
    for first, stop, rows in runs(queries.pieces):
        for start, end, columns in runs(keys.pieces):
            plan = _plan(asked, (first, stop), (start, end), queries.query)
            if plan is None:
                continue
            match = None
            if queries.labels is not None and keys.labels is not None:
                pairs = range(queries.labels.shape[-1])
                match = [
                    (queries.labels[:, rows, pair], keys.labels[:, columns, pair]) for pair in pairs
                ]
            problem = make_problem(
                queries.query[:, :, rows],
                keys.key[:, :, columns],
                keys.value[:, :, columns],
                scale=asked.scale,
                softcap=asked.softcap,
                block_size=asked.block,
                statistics=names,
                match=match if "match_mass" in names else None,
            )
            yield _Pair(
                replace(problem, plan=plan, prefix=asked.prefix),
                rows,
                columns,
                stop - end,
                None if keys.groups is None else keys.groups[:, columns],
            )


def states(asked: Asked, queries: Queries, keys: Keys) -> list[AttentionState]:
    """The state of the queries over these keys, and that over the keys of each group."""
    found: dict[int, list[AttentionState]] = {}
    for pair in _pairs(asked, queries, keys, asked.rows | {"lse"}):
        parts = _pair_states(asked, pair)
        have = found.get(pair.rows.start)
        if have is not None:
            parts = [merge(*both) for both in zip(have, parts, strict=True)]
        found[pair.rows.start] = parts
    of_pieces = [
        found.get(rows.start) or _nothing(asked, queries, keys, rows)
        for _, _, rows in runs(queries.pieces)
    ]
    return [_side_by_side(parts) for parts in zip(*of_pieces, strict=True)]


def _pair_states(asked: Asked, pair: _Pair) -> list[AttentionState]:
    problem, groups = pair.problem, pair.groups
    own = None if groups is None else int(groups[0, 0])
    mixed = groups is not None and not bool((groups == own).all())
    if mixed:
        problem = replace(problem, groups=groups, group_count=asked.group_count)
    result = run_problem(problem, asked.backend)
    lse = result.statistics["lse"]
    carried = {name: result.statistics[name] for name in asked.rows}
    whole = _state(result.output, lse, carried, pair.shift)
    if groups is None:
        return [whole]
    if mixed:
        assert result.groups is not None
        return [
            whole,
            *(
                _state(state.output, state.lse, dict(state.statistics), pair.shift)
                for state in result.groups.states
            ),
        ]
    alone = _of_group(whole)
    others = AttentionState.empty_like(alone)
    return [whole, *(alone if group == own else others for group in range(asked.group_count))]


def _state(
    output: Tensor, lse: Tensor, statistics: dict[str, Tensor], shift: int
) -> AttentionState:
    if "distance" in statistics:
        statistics["distance"] = statistics["distance"] + shift * (lse > -_INF)
    return AttentionState(output.to(lse.dtype), lse, statistics, placed=True)


def _of_group(state: AttentionState) -> AttentionState:
    kept = {name: state.statistics[name] for name in OF_GROUPS if name in state.statistics}
    return AttentionState(state.output, state.lse, kept, placed=True)


def _nothing(asked: Asked, queries: Queries, keys: Keys, rows: slice) -> list[AttentionState]:
    """States of queries that see none of the keys."""
    query = queries.query[:, :, rows]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_full(query.shape[:3], -_INF, dtype=dtype)
    pairs = 0 if queries.labels is None else queries.labels.shape[-1]
    carried = {
        name: torch.full_like(lse, -_INF if name == "max_logit" else 0)
        if name != "match_mass"
        else lse.new_zeros(*lse.shape, pairs)
        for name in asked.rows
    }
    whole = AttentionState(
        lse.new_zeros(*lse.shape, keys.value.shape[-1]), lse, carried, placed=True
    )
    return [whole, *[_of_group(whole)] * asked.group_count]


def _side_by_side(parts: Sequence[AttentionState]) -> AttentionState:
    """The states of pieces of queries, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    axis = parts[0].lse.dim() - 1
    return AttentionState(
        torch.cat([part.output for part in parts], axis),
        torch.cat([part.lse for part in parts], axis),
        {
            name: torch.cat([part.statistics[name] for part in parts], axis)
            for name in parts[0].statistics
        },
        placed=True,
    )


@dataclass(frozen=True, eq=False)
class Sums:
    """What is summed over rows, of some queries and keys.

    Attributes:
        received: [batch, heads, keys].
        diagonal: [batch, heads, distances], of the whole sequence.
        mass: [batch, heads, query blocks, key blocks], summed over rows.
        largest: the same shape, largest probability.
    """

    received: Tensor
    diagonal: Tensor
    mass: Tensor
    largest: Tensor


def sums(asked: Asked, queries: Queries, lse: Tensor, keys: Keys) -> Sums:
    """The sums of `exp(s - lse)`; those that are not asked for are empty or 0."""
    lines, count = lse.shape[:2], keys.key.shape[2]
    wants_maps = bool({"block_mass", "block_max"} & asked.sums)
    shape = [blocks_of(queries.pieces, asked.block), blocks_of(keys.pieces, asked.block)]
    found = Sums(
        lse.new_zeros(*lines, count),
        lse.new_zeros(*lines, asked.distances if "diagonal" in asked.sums else 0),
        lse.new_zeros(*lines, *(shape if wants_maps else (0, 0))),
        lse.new_zeros(*lines, *(shape if wants_maps else (0, 0))),
    )
    for pair in _pairs(asked, queries, keys, frozenset()):
        own = lse[:, :, pair.rows]
        tensors = known_sums(pair.problem, own, asked.sums, asked.backend)
        if "received" in asked.sums:
            found.received[:, :, pair.columns] += tensors["received"]
        if "diagonal" in asked.sums:
            _add_diagonal(asked, found.diagonal, tensors["diagonal"], pair)
        at = _block_place(asked, queries, keys, pair)
        if "block_mass" in asked.sums:
            plan = pair.problem.plan
            seen = (plan.high > plan.low)[:, None] & (own > -_INF)
            found.mass[at] = tensors["block_mass"] * seen_rows(seen, asked.block)[..., None]
        if "block_max" in asked.sums:
            found.largest[at] = tensors["block_max"]
    return found


def _add_diagonal(asked: Asked, whole: Tensor, part: Tensor, pair: _Pair) -> None:
    """`part[..., t]` is distance `1 - queries + t + shift`."""
    first = 1 - pair.problem.queries + pair.shift + (0 if asked.causal else asked.length - 1)
    cut = max(0, -first)  # later keys, which hold nothing under a causal mask
    whole[..., first + cut : first + part.shape[-1]] += part[..., cut:]


def _block_place(
    asked: Asked, queries: Queries, keys: Keys, pair: _Pair
) -> tuple[slice, slice, slice, slice]:
    def place(pieces: Pieces, tokens: slice) -> slice:
        before = [run for run in runs(pieces) if run[2].start < tokens.start]
        first = blocks_of([(start, stop) for start, stop, _ in before], asked.block)
        return slice(first, first - (-(tokens.stop - tokens.start) // asked.block))

    every = slice(None)
    return every, every, place(queries.pieces, pair.rows), place(keys.pieces, pair.columns)
