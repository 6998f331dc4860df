"""NaN and infinite inputs: one meaning for every backend.

* A query or key that holds a NaN or an infinity makes each of its logits NaN, a bias of NaN or +inf
  makes its own.
* A row that sees such a logit is NaN: output, LSE and row statistics; so is what is summed over it:
  received mass, diagonals and blocks, at each key that the row sees, and `top_mass` of its blocks.
* A value that holds one makes its column of the output NaN in the rows that see it, and their norms.
* What a row does not see does not reach it; what no row sees leaves no trace.

Backends know none of this: `guarded` runs them as they are, and where a query, a key or an output is
not finite, again on inputs with zeros in those places, and writes the NaN itself. That second run
takes time quadratic in the length and memory linear in it. Gradients are not defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lens_kernels.problem import BackendResult, MaskPlan, Problem, statistic_shape
from lens_kernels.statistics import STATISTICS, Statistic
from lens_kernels.types import AttentionMask

_INF = float("inf")
_NORMS = ("value_norm", "mean_value_norm")
CELLS = 1 << 24
"""Pairs of a query and a key that are looked at together."""


def guarded(
    problem: Problem,
    run: Callable[[Problem], BackendResult],
    table: Mapping[str, Statistic] = STATISTICS,
) -> BackendResult:
    """What `run(problem)` gives, with the meaning above where inputs are not finite.

    `table` says which axes the numbers of the result have.
    """
    result = run(problem)
    if _finite(problem, result):
        return result
    bad = _Bad.of(problem)
    if not bad.any():
        return result  # finite inputs overflowed
    marks = _Marks(problem)
    step = max(1, CELLS // (problem.batch * problem.heads * problem.keys))
    for first in range(0, problem.queries, step):
        marks.add(slice(first, min(first + step, problem.queries)), bad)
    return marks.applied(run(bad.without(problem)), table)


def clean_padding(
    mask: AttentionMask,
    plan: MaskPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Zeros where no query may look, so that what lies there (NaN) cannot reach a sum."""
    parts = (
        mask.key_lengths,
        mask.query_lengths,
        mask.key_start,
        mask.key_padding,
        mask.cu_seqlens,
    )
    if all(part is None for part in parts):
        return query, key, value, weights
    query = query.masked_fill((plan.high <= plan.low)[:, None, :, None], 0)
    hidden = _hidden_keys(plan)[:, None]
    key = key.masked_fill(hidden[..., None], 0)
    value = value.masked_fill(hidden[..., None], 0)
    weights = None if weights is None else weights.masked_fill(hidden, 0)
    return query, key, value, weights


def _hidden_keys(plan: MaskPlan) -> Tensor:
    """bool [batch, keys], True where no query row's interval holds the key."""
    batch, keys = plan.key_position.shape
    steps = torch.zeros(batch, keys + 1, dtype=torch.int32, device=plan.low.device)
    one = torch.ones_like(plan.low)
    steps.scatter_add_(1, plan.low.long(), one)
    steps.scatter_add_(1, plan.high.long(), -one)
    hidden = steps.cumsum(1)[:, :keys] <= 0
    return hidden if plan.keep is None else hidden | ~plan.keep


@torch.no_grad()
def _finite(problem: Problem, result: BackendResult) -> bool:
    """Whether queries, keys and values hold neither NaN nor infinity; where the backend did not look, by sums of them and
    of the output.

    A sum is finite only where every number in it is; finite ones that overflow are told apart later. An
    infinity in a key may leave none in the output: its logits are -inf where the query is negative.
    """
    if result.looked_at_values and problem.plan.bias is None:
        return not result.infinite
    looked = [result.output]
    if result.infinite is None:
        looked += [problem.query, problem.key]
    sums = [part.sum(dtype=problem.compute_dtype) for part in looked]
    return not result.infinite and math.isfinite(sum(sums[1:], start=sums[0]))


@dataclass(frozen=True, eq=False)
class _Bad:
    """Where inputs are not finite."""

    query: Tensor  # bool [batch, heads, queries]
    key: Tensor  # bool [batch, kv_heads, keys]
    value: Tensor  # bool [batch, kv_heads, keys, value_dim]
    bias: Tensor | None  # bool [batch | 1, heads | 1, queries | 1, keys]

    @classmethod
    def of(cls, problem: Problem) -> _Bad:
        bias = problem.plan.bias
        return cls(
            ~problem.query.isfinite().all(-1),
            ~problem.key.isfinite().all(-1),
            ~problem.value.isfinite(),
            None if bias is None else ~(bias < _INF),
        )

    def any(self) -> bool:
        parts = (self.query, self.key, self.value, self.bias)
        return any(bool(part.any()) for part in parts if part is not None)

    def without(self, problem: Problem) -> Problem:
        """The problem with zeros in the places of what is not finite."""
        bias = problem.plan.bias
        if bias is not None and self.bias is not None:
            bias = bias.masked_fill(self.bias, 0)
        return replace(
            problem,
            query=problem.query.masked_fill(self.query[..., None], 0),
            key=problem.key.masked_fill(self.key[..., None], 0),
            value=problem.value.masked_fill(self.value, 0),
            plan=replace(problem.plan, bias=bias),
        )


class _Marks:
    """Which numbers of the result are NaN, gathered from some query rows after the other."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        lines = (problem.batch, problem.heads)
        places = {"device": problem.device, "dtype": torch.bool}
        self.rows = torch.zeros(*lines, problem.queries, **places)
        self.output = torch.zeros(*lines, problem.queries, problem.value_dim, **places)
        self.received = torch.zeros(*lines, problem.keys, **places)
        self.diagonal = torch.zeros(*lines, problem.distances, **places)
        self.blocks = torch.zeros(*lines, problem.query_blocks, problem.key_blocks, **places)
        count = problem.group_count
        self.group_rows = torch.zeros(count, *lines, problem.queries, **places)
        self.group_output = torch.zeros(count, *self.output.shape, **places)

    def add(self, rows: slice, bad: _Bad) -> None:
        problem = self.problem
        share = problem.heads // problem.kv_heads
        seen = visible_rows(problem, rows)  # [B, H, R, K]
        wrong = bad.query[:, :, rows, None] | bad.key.repeat_interleave(share, 1)[:, :, None]
        if bad.bias is not None:
            wrong = wrong | _part(bad.bias, rows)
        wrong = seen & wrong
        value = bad.value.repeat_interleave(share, 1).float()  # [B, H, K, D]
        self.rows[:, :, rows] = wrong.any(-1)
        self.output[:, :, rows] = (seen.float() @ value > 0) | wrong.any(-1)[..., None]
        for group in range(problem.group_count):
            assert problem.groups is not None
            member = (problem.groups == group)[:, None, None]
            found = (wrong & member).any(-1)
            self.group_rows[group][:, :, rows] = found
            reached = (seen & member).float() @ value > 0
            self.group_output[group][:, :, rows] = reached | found[..., None]
        self._add_columns(rows, seen & wrong.any(-1)[..., None])

    def _add_columns(self, rows: slice, touched: Tensor) -> None:
        """`touched` [B, H, R, K]: pairs whose probability is NaN."""
        problem = self.problem
        self.received |= touched.any(2)
        index = torch.arange(problem.keys, device=problem.device)
        place = problem.plan.anchor[:, rows, None] - index - problem.diagonal_start
        inside = (place >= 0) & (place < problem.distances)
        place = place.clamp(0, problem.distances - 1)[:, None].expand_as(touched).flatten(2).long()
        hits = torch.zeros(self.diagonal.shape, device=problem.device)
        hits.scatter_add_(2, place, (touched & inside[:, None]).flatten(2).float())
        self.diagonal |= hits > 0
        height, width = problem.block_size
        short = -problem.keys % width
        by_key = torch.nn.functional.pad(touched, (0, short)).unflatten(-1, (-1, width)).any(-1)
        block = torch.arange(problem.queries, device=problem.device)[rows] // height
        hits = torch.zeros(self.blocks.shape, device=problem.device)
        self.blocks |= hits.index_add_(2, block, by_key.float()) > 0

    def applied(self, result: BackendResult, table: Mapping[str, Statistic]) -> BackendResult:
        """The result with its NaN."""
        problem = self.problem
        norms = self.output.any(-1)
        marks = {
            "queries": self.rows,
            "keys": self.received,
            "distances": self.diagonal,
            "key_blocks": self.blocks,
            "k": self.blocks.any(-1, keepdim=True),
        }
        tensors = {}
        for name, tensor in result.tensors.items():
            mark = norms if name in _NORMS else _mark_of(marks, table[name].axes)
            if tensor.is_floating_point():
                wide = mark.reshape(mark.shape + (1,) * (tensor.dim() - mark.dim()))
                assert tuple(tensor.shape) == statistic_shape(problem, name, table)
                tensor = tensor.masked_fill(wide, torch.nan)
            tensors[name] = tensor
        groups = result.groups
        if groups is not None:
            groups = replace(
                groups,
                output=groups.output.masked_fill(
                    self.group_output[..., : groups.output.shape[-1]], torch.nan
                ),
                lse=groups.lse.masked_fill(self.group_rows, torch.nan),
                statistics={
                    name: tensor.masked_fill(self.group_rows, torch.nan)
                    for name, tensor in groups.statistics.items()
                },
            )
        output = result.output.masked_fill(self.output, torch.nan)
        return replace(result, output=output, tensors=tensors, groups=groups)


def _mark_of(marks: dict[str, Tensor], axes: tuple[str, ...]) -> Tensor:
    last = next(axis for axis in reversed(axes) if axis in marks)
    return marks[last]


def _part(tensor: Tensor, rows: slice) -> Tensor:
    """The rows of [batch | 1, heads | 1, queries | 1, keys]."""
    return tensor if tensor.shape[2] == 1 else tensor[:, :, rows]


def visible_rows(problem: Problem, rows: slice) -> Tensor:
    """bool [batch, heads, rows, keys]: the row sees the key."""
    plan = problem.plan
    index = torch.arange(problem.keys, device=problem.device)
    low, high = plan.low[:, rows, None], plan.high[:, rows, None]
    seen = ((index >= low) & (index < high))[:, None]
    if plan.keep is not None:
        seen = seen & plan.keep[:, None, None]
    if plan.allowed is not None:
        seen = seen & _part(plan.allowed, rows)
    if plan.bias is not None:
        seen = seen & (_part(plan.bias.detach(), rows) != -_INF)
    if problem.block_mask is not None:
        height, width = problem.block_size
        block = torch.arange(problem.queries, device=problem.device)[rows] // height
        seen = seen & problem.block_mask[:, :, block][..., index // width]
    return seen.expand(problem.batch, problem.heads, -1, -1)
