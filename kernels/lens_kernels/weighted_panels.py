"""Weights that are no softmax, panel by panel: output, statistics and gradients of `weighted_attention`.

A panel holds some query rows of all heads, at most `BUDGET` weights, and is computed again in the backward
pass. Statistics with one number per row stand side by side, the others are summed over the panels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from lens_kernels.nonfinite import visible_rows
from lens_kernels.normalisers import Differential, Normaliser, weights_of
from lens_kernels.problem import BackendResult, Problem
from lens_kernels.states import seen_rows
from lens_kernels.statistics import Statistic

BUDGET = 1 << 21
"""Weights of one panel, all batch rows and heads together."""

_INF = float("inf")
_ROW = ("batch", "heads", "queries")
_MAP = ("batch", "heads", "query_blocks", "key_blocks")
_TABLE = (
    Statistic("row_sum", _ROW, "sum W"),
    Statistic("magnitude", _ROW, "sum |W|"),
    Statistic("active", _ROW, "number of keys whose weight is not 0"),
    Statistic("entropy", _ROW, "-sum S log S, nats"),
    Statistic("concentration", _ROW, "sum S^2; its inverse is the effective number of keys"),
    Statistic("distance", _ROW, "sum S * (anchor - key), tokens"),
    Statistic("prefix_mass", _ROW, "sum W of the first `prefix` keys of the row's sequence"),
    Statistic(
        "match_mass",
        (*_ROW, "pairs"),
        "sum W [query label == key label], per pair of labels; negative labels never match",
        needs="match",
    ),
    Statistic("value_norm", _ROW, "norm of sum W v"),
    Statistic("received", ("batch", "heads", "keys"), "column sum of W over the queries"),
    Statistic("diagonal", ("batch", "heads", "distances"), "sum W at each distance anchor - key"),
    Statistic("block_mass", _MAP, "sum of W in the block, mean over its seen rows"),
    Statistic("block_magnitude", _MAP, "sum of |W| in the block, mean over its seen rows"),
    Statistic("block_max", _MAP, "largest |W| in the block"),
)
WEIGHT_STATISTICS: dict[str, Statistic] = {entry.name: entry for entry in _TABLE}


@dataclass(frozen=True, eq=False)
class Work:
    """What is computed of every panel."""

    normaliser: Normaliser
    names: frozenset[str]
    keys: int
    number: Tensor  # [1 | heads, 1, 1]

    def wants(self, *names: str) -> bool:
        return not self.names.isdisjoint(names)


def halves(problem: Problem) -> list[Problem]:
    """The problems of both maps of `Differential`, whose queries and keys lie side by side."""
    size = problem.head_dim // 2
    return [
        replace(problem, query=problem.query[..., part], key=problem.key[..., part])
        for part in (slice(0, size), slice(size, 2 * size))
    ]


@dataclass(frozen=True)
class _Panel:
    """Rows of one query block, and the keys from the first to the last that any of them sees."""

    block: int
    rows: slice
    columns: slice  # from a block's first key


def _panels(problem: Problem) -> Iterator[_Panel]:
    height, width = problem.block_size
    ranges = problem.plan.ranges(height)
    for block in range(problem.query_blocks):
        ends = [row[block] for row in ranges if row[block][1]]
        first = min((low for low, _ in ends), default=0) // width * width
        last = max((high for _, high in ends), default=min(width, problem.keys))
        lines = problem.batch * problem.heads * (last - first)
        start, stop = block * height, min((block + 1) * height, problem.queries)
        step = max(1, BUDGET // lines)
        for at in range(start, stop, step):
            yield _Panel(block, slice(at, min(at + step, stop)), slice(first, last))


def by_panels(problem: Problem, work: Work) -> BackendResult:
    """Output and statistics, panel by panel; differentiable, computed again in the backward pass."""
    inputs = (problem.query, problem.key, problem.value, problem.plan.bias, work.number)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    rows: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    maps: dict[str, list[Tensor]] = {}
    for panel in _panels(problem):

        def compute(*_: Tensor | None, panel: _Panel = panel) -> dict[str, Tensor]:
            return _of_panel(problem, work, panel)

        found: Any = checkpoint(compute, *inputs, use_reentrant=False) if keeps else compute()
        for name, tensor in found.items():
            axis = WEIGHT_STATISTICS[name].axes[2] if name in work.names else "queries"
            if axis == "queries":
                rows.setdefault(name, []).append(tensor)
            elif axis == "query_blocks":
                blocks = maps.setdefault(name, [])
                if len(blocks) == panel.block:
                    blocks.append(tensor)
                else:
                    joined = torch.maximum if name == "block_max" else torch.add
                    blocks[-1] = joined(blocks[-1], tensor)
            else:
                sums[name] = sums[name] + tensor if name in sums else tensor
    tensors = {name: torch.cat(parts, 2) for name, parts in rows.items()} | sums
    count = seen_rows(tensors.pop("seen"), problem.block_size[0])[..., None]
    for name, parts in maps.items():
        whole = torch.stack(parts, 2)
        tensors[name] = whole if name == "block_max" else whole / count
    output = tensors.pop("output").to(problem.query.dtype)
    return BackendResult(output, {name: part.contiguous() for name, part in tensors.items()})


def _of_panel(problem: Problem, work: Work, panel: _Panel) -> dict[str, Tensor]:
    """Output, whether each row sees a key ("seen"), and what the panel adds to each statistic."""
    seen = visible_rows(problem, panel.rows)[..., panel.columns]
    parts = halves(problem) if isinstance(work.normaliser, Differential) else [problem]
    scores = [_logits(part, panel).masked_fill(~seen, -_INF) for part in parts]
    weights = weights_of(work.normaliser, scores, work.number, work.keys)
    output = _times(problem, weights, problem.value[:, :, panel.columns])
    found = {"output": output, "seen": seen.any(-1)}
    if work.wants("value_norm"):
        found["value_norm"] = output.norm(dim=-1)
    found |= _row_numbers(problem, work, panel, weights)
    found |= _column_numbers(problem, work, panel, weights)
    found |= _block_numbers(problem, work, panel, weights)
    return found


def _logits(problem: Problem, panel: _Panel) -> Tensor:
    """`s` [batch, heads, rows, columns], nothing hidden yet."""
    plan, dtype = problem.plan, problem.compute_dtype
    query = problem.query[:, :, panel.rows].to(dtype).unflatten(1, (problem.kv_heads, -1))
    key = problem.key[:, :, panel.columns].to(dtype)
    scores = torch.einsum("bghqd,bgkd->bghqk", query, key).flatten(1, 2) * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if plan.bias is not None:
        bias = plan.bias if plan.bias.shape[2] == 1 else plan.bias[:, :, panel.rows]
        scores = scores + bias[..., panel.columns].to(dtype)
    if plan.slopes is not None:
        scores = scores - plan.slopes[:, None, None] * _distance(problem, panel).abs()[:, None]
    return scores


def _times(problem: Problem, weights: Tensor, value: Tensor) -> Tensor:
    grouped = weights.unflatten(1, (problem.kv_heads, -1))
    return torch.einsum("bghqk,bgkd->bghqd", grouped, value.to(weights.dtype)).flatten(1, 2)


def _distance(problem: Problem, panel: _Panel) -> Tensor:
    """`anchor - j` [batch, rows, columns]."""
    index = torch.arange(panel.columns.start, panel.columns.stop, device=problem.device)
    anchor = problem.plan.anchor[:, panel.rows, None]
    return (anchor - index).to(problem.compute_dtype)


def _row_numbers(problem: Problem, work: Work, panel: _Panel, weights: Tensor) -> dict[str, Tensor]:
    size = weights.abs()
    magnitude = size.sum(-1)
    share = size / torch.where(magnitude > 0, magnitude, 1)[..., None]
    found = {"row_sum": weights.sum(-1), "magnitude": magnitude}
    if work.wants("active"):
        found["active"] = (weights != 0).sum(-1).to(weights.dtype)
    if work.wants("entropy"):
        found["entropy"] = -(share * torch.where(share > 0, share, 1).log()).sum(-1)
    if work.wants("concentration"):
        found["concentration"] = share.square().sum(-1)
    if work.wants("distance"):
        found["distance"] = (share * _distance(problem, panel)[:, None]).sum(-1)
    if work.wants("prefix_mass"):
        inside = problem.plan.key_position[:, None, None, panel.columns] < problem.prefix
        found["prefix_mass"] = (weights * inside).sum(-1)
    if work.wants("match_mass"):
        assert problem.query_labels is not None
        assert problem.key_labels is not None
        row = problem.query_labels[:, panel.rows, None]
        equal = (row == problem.key_labels[:, None, panel.columns]) & (row >= 0)
        found["match_mass"] = torch.einsum("bhqk,bqkp->bhqp", weights, equal.to(weights.dtype))
    return {name: tensor for name, tensor in found.items() if name in work.names}


def _column_numbers(
    problem: Problem, work: Work, panel: _Panel, weights: Tensor
) -> dict[str, Tensor]:
    found = {}
    if work.wants("received"):
        behind = problem.keys - panel.columns.stop
        found["received"] = pad(weights.sum(2), (panel.columns.start, behind))
    if work.wants("diagonal"):
        place = _distance(problem, panel).long()[:, None].expand_as(weights).flatten(2)
        place = place - problem.diagonal_start
        inside = (place >= 0) & (place < problem.distances)
        zeros = weights.new_zeros(problem.batch, problem.heads, problem.distances)
        found["diagonal"] = zeros.scatter_add(
            2, torch.where(inside, place, 0), weights.flatten(2) * inside
        )
    return found


def _block_numbers(
    problem: Problem, work: Work, panel: _Panel, weights: Tensor
) -> dict[str, Tensor]:
    """Sums over the panel's rows, [batch, heads, key_blocks]."""
    width = problem.block_size[1]
    short = -(panel.columns.stop - panel.columns.start) % width
    before = panel.columns.start // width
    behind = (
        problem.key_blocks - before - (panel.columns.stop - panel.columns.start + short) // width
    )

    def by_block(matrix: Tensor) -> Tensor:
        return pad(matrix, (0, short)).unflatten(-1, (-1, width))

    parts = {
        "block_mass": lambda: by_block(weights).sum((2, 4)),
        "block_magnitude": lambda: by_block(weights.abs()).sum((2, 4)),
        "block_max": lambda: by_block(weights.abs()).amax((2, 4)),
    }
    return {name: pad(of(), (before, behind)) for name, of in parts.items() if name in work.names}
