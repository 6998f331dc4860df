"""The keys cut into pieces, for few queries: pieces side by side, merged exactly.

The pieces become the batch rows of one problem; each batch row of the cache is a view of it, nothing
is copied. The states of the pieces merge (states.py). Statistics that sum over query rows are taken
row by row, weighted with `exp(lse_piece - lse)` and then summed as `attention` does, in a fixed order:
the same bits on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lens_kernels.problem import (
    BackendResult,
    Problem,
    group_statistics,
    top_blocks,
)
from lens_kernels.states import MERGEABLE, AttentionState, merge, seen_rows
from lens_kernels.types import AttentionGroups

PIECE = 4096
"""Keys of a piece by default."""

_INF = float("inf")
_MAPS = ("block_mass", "block_weighted", "block_max", "block_max_logit")


@torch.no_grad()
def run_split(
    problem: Problem, run: Callable[[Problem], BackendResult], piece: int
) -> BackendResult:
    """What `run(problem)` gives, from pieces of `piece` keys (a multiple of the key block)."""
    by_query = problem.wants("received", "diagonal")  # a sum over queries, unless there is one
    step = 1 if by_query else problem.queries
    slices = [slice(at, at + step) for at in range(0, problem.queries, step)]
    rows = _joined(
        [
            _joined([_merged(problem, run, piece, batch, part) for part in slices], 2)
            for batch in range(problem.batch)
        ],
        0,
    )
    tensors = {name: rows[name] for name in MERGEABLE | {"lse"} if name in rows}
    tensors |= _block_statistics(problem, rows)
    if by_query:
        tensors |= _column_statistics(problem, rows["probability"])
    wanted = {name: tensors[name].contiguous() for name in problem.statistics if name in tensors}
    groups = None
    if problem.groups is not None:
        groups = AttentionGroups(
            rows["group_output"].movedim(3, 0),
            rows["group_lse"].movedim(3, 0),
            {name: rows[f"group_{name}"].movedim(3, 0) for name in group_statistics(problem)},
        )
    output = rows["output"].to(problem.query.dtype)
    return BackendResult(output, {"lse": tensors["lse"].contiguous(), **wanted}, groups)


def _joined(parts: list[dict[str, Tensor]], axis: int) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts], axis) for name in parts[0]}


def _merged(
    problem: Problem,
    run: Callable[[Problem], BackendResult],
    piece: int,
    batch: int,
    rows: slice,
) -> dict[str, Tensor]:
    """Some queries of a batch row: by name, tensors [1, heads, queries, ...].

    Row statistics, output and LSE; block maps by row (`row_...`); `probability`, where sums over
    the queries are asked for; group states with the group axis behind the queries.
    """
    whole = problem.keys // piece
    cuts = (
        [(0, whole, piece)]
        if problem.grid is None
        else [(i * piece, 1, piece) for i in range(whole)]
    )
    if problem.keys % piece:
        cuts.append((whole * piece, 1, problem.keys % piece))
    states, group_states, by_row = [], [], []
    for start, count, length in cuts:
        if not count:
            continue
        part = _pieces(problem, batch, rows, start, count, length)
        result = run(part)
        for number in range(count):
            states.append(_state(result, problem, number))
            by_row.append({name: result.tensors[name][number] for name in _row_sums(part)})
            if result.groups is not None:
                group_states.append(_group_state(result.groups, problem, number))
    sinks = None if problem.sink_logits is None else problem.sink_logits.detach()
    total = merge(*states, sink_logits=sinks)
    found = {"output": total.output, "lse": total.lse, **total.statistics}
    for name in by_row[0]:
        found |= _row_wise(name, [part[name] for part in by_row], states, total.lse)
    if group_states:
        group = merge(*group_states)
        named = {"output": group.output, "lse": group.lse, **group.statistics}
        found |= {f"group_{name}": tensor.movedim(0, 2) for name, tensor in named.items()}
    return {name: tensor[None] for name, tensor in found.items()}


def _row_sums(part: Problem) -> list[str]:
    return [name for name in (*_MAPS, "received") if part.wants(name)]


def _state(result: BackendResult, problem: Problem, number: int) -> AttentionState:
    """[heads, queries, ...] of one piece."""
    return AttentionState(
        result.output[number].to(problem.compute_dtype),
        result.tensors["lse"][number],
        {name: result.tensors[name][number] for name in sorted(problem.statistics & MERGEABLE)},
        placed=True,
    )


def _group_state(groups: AttentionGroups, problem: Problem, number: int) -> AttentionState:
    """[groups, heads, queries, ...] of one piece; without outputs where nobody wants them, which backends may leave in."""
    statistics = {name: tensor[:, number] for name, tensor in groups.statistics.items()}
    output = groups.output[:, number]
    output = output if problem.group_outputs else output[..., :0]
    return AttentionState(output, groups.lse[:, number], statistics, placed=True)


def _row_wise(
    name: str, parts: list[Tensor], states: list[AttentionState], lse: Tensor
) -> dict[str, Tensor]:
    """Side by side, what the pieces have for each row: {new name: [heads, queries, blocks or keys]}."""
    if name == "received":  # of a single query: its row of P
        parts = [part[:, None] for part in parts]
    if name != "block_max_logit":
        seen = lse.masked_fill(lse == -_INF, _INF)
        shares = [torch.exp(state.lse - seen)[..., None] for state in states]
        parts = [part * share for part, share in zip(parts, shares, strict=True)]
    new = "probability" if name == "received" else f"row_{name}"
    return {new: torch.cat(parts, -1)}


def _block_statistics(problem: Problem, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Block maps [batch, heads, query_blocks, key_blocks] from those by row."""
    height = problem.block_size[0]
    short = -problem.queries % height

    def blocks(name: str, fill: float) -> Tensor:
        padded = torch.nn.functional.pad(rows[name], (0, 0, 0, short), value=fill)
        return padded.unflatten(2, (-1, height))

    count = seen_rows(rows["lse"] > -_INF, height)
    found = {}
    for name in _MAPS:
        if f"row_{name}" not in rows:
            continue
        if name in ("block_mass", "block_weighted"):
            found[name] = blocks(f"row_{name}", 0).sum(3) / count[..., None]
        else:
            found[name] = blocks(f"row_{name}", 0 if name == "block_max" else -_INF).amax(3)
    if problem.wants("top_keys", "top_mass"):
        found["top_keys"], found["top_mass"] = top_blocks(found["block_mass"], problem.top_k)
    return found


def _column_statistics(problem: Problem, probability: Tensor) -> dict[str, Tensor]:
    """`received` and `diagonal` from the rows of `P` [batch, heads, queries, keys]."""
    distance = torch.arange(problem.distances, device=problem.device) + problem.diagonal_start
    diagonal = probability.new_zeros(problem.batch, problem.heads, problem.distances)
    for row in range(problem.queries):  # gathered, not scattered: sums in one order
        key = problem.plan.anchor[:, row, None].long() - distance  # [batch, distances]
        inside = (key >= 0) & (key < problem.keys)
        key = key.clamp(0, problem.keys - 1)[:, None].expand_as(diagonal)
        diagonal += probability[:, :, row].gather(2, key) * inside[:, None]
    return {"received": probability.sum(2), "diagonal": diagonal}


def _pieces(
    problem: Problem, batch: int, rows: slice, start: int, count: int, length: int
) -> Problem:
    """`count` pieces of `length` keys from `start` on, as batch rows; the keys are a view."""
    plan, width = problem.plan, problem.block_size[1]
    stop = start + count * length
    first = torch.arange(start, stop, length, dtype=torch.int32, device=problem.device)[:, None]

    def keys(tensor: Tensor, axis: int) -> Tensor:
        """The pieces of a tensor without batch axis, as its new first axis."""
        return (
            tensor.narrow(axis, start, stop - start)
            .unflatten(axis, (count, length))
            .movedim(axis, 0)
        )

    def optional(tensor: Tensor | None, axis: int) -> Tensor | None:
        return None if tensor is None else keys(tensor[batch], axis)

    def plane(tensor: Tensor | None) -> Tensor | None:
        """Of [batch | 1, heads | 1, queries | 1, keys]."""
        if tensor is None:
            return None
        part = tensor[0 if tensor.shape[0] == 1 else batch]
        return keys(part if part.shape[1] == 1 else part[:, rows], 2)

    low, high = ((end[batch, rows] - first).clamp(0, length) for end in (plan.low, plan.high))
    empty = high <= low
    mask = problem.block_mask
    if mask is not None:
        index = torch.arange(problem.queries, device=problem.device)[rows] // problem.block_size[0]
        blocks = mask[
            0 if mask.shape[0] == 1 else batch, :, index, start // width : math.ceil(stop / width)
        ]
        mask = blocks.unflatten(-1, (count, -1)).movedim(-2, 0)
    labels = problem.query_labels
    query = problem.query[batch, :, rows]
    return replace(
        problem,
        query=query.expand(count, *query.shape),
        key=keys(problem.key[batch], 1),
        value=keys(problem.value[batch], 1),
        plan=replace(
            plan,
            low=low.masked_fill(empty, 0),
            high=high.masked_fill(empty, 0),
            anchor=plan.anchor[batch, rows] - first,
            key_position=keys(plan.key_position[batch], 0),
            keep=optional(plan.keep, 0),
            allowed=plane(plan.allowed),
            bias=plane(plan.bias),
            simple=False,
        ),
        sink_logits=None,
        block_size=(1, width),
        statistics=_asked(problem),
        query_labels=None if labels is None else labels[batch, rows].expand(count, -1, -1),
        key_labels=optional(problem.key_labels, 0),
        grid=None if problem.grid is None else (*problem.grid[:2], problem.grid[2] - start),
        groups=optional(problem.groups, 0),
        block_mask=mask,
        key_weights=optional(problem.key_weights, 1),
        differentiable=frozenset(),
    )


def _asked(problem: Problem) -> frozenset[str]:
    """What the pieces compute."""
    names = {name for name in problem.statistics if name in MERGEABLE or name in _MAPS}
    if problem.wants("top_keys", "top_mass"):
        names.add("block_mass")
    if problem.wants("received", "diagonal"):
        names.add("received")
    return frozenset({"lse", *names})
