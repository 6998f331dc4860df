"""The backend `torch`: plain torch on any device, one panel of query rows at a time.

A panel is the rows of one query block (or a part of them) against all the keys that they can see,
at most `BUDGET` logits at once, so `P` exists only panel by panel. A panel holds whole rows: the
row maximum and the LSE come first and every statistic is a plain sum or maximum of `P`, without any
rescaling. Keys that a panel cannot see (causal, window, packing, `block_mask`) are never read. It
serves every problem and is the slow one: a compiled backend keeps a tile in registers or cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lens_kernels.problem import (
    BackendResult,
    Problem,
    row_features,
    statistic_shape,
    top_blocks,
)
from lens_kernels.statistics import STATISTICS
from lens_kernels.types import AttentionGroups

BUDGET = 1 << 21
"""Logits of one panel, all its heads together."""

_INF = float("inf")


def supports(problem: Problem) -> str | None:
    """It can do everything, on any device."""
    return None


@torch.no_grad()
def run(problem: Problem) -> BackendResult:
    """Output, statistics and group states, panel by panel."""
    out = {
        name: problem.query.new_full(
            statistic_shape(problem, name), fill, dtype=problem.compute_dtype
        )
        for name, fill in _fills(problem).items()
    }
    if "top_keys" in out:
        first = torch.arange(problem.top_k, device=problem.device)  # for rows that see nothing
        out["top_keys"] = first.expand(out["top_keys"].shape).clone()
    output = problem.query.new_zeros((*problem.query.shape[:3], problem.value_dim))
    groups = None
    if problem.groups is not None:
        shape = (problem.group_count, *output.shape)
        groups = AttentionGroups(
            output.new_zeros(shape, dtype=problem.compute_dtype),
            output.new_full(shape[:-1], -_INF, dtype=problem.compute_dtype),
        )
    features = row_features(problem)
    for strip in _strips(problem):
        blocks = _BlockSums(problem, strip)
        for rows in strip.rows:
            panel = _Panel(problem, strip, rows)
            at = (strip.batch, strip.heads, rows)
            result = panel.times(panel.probability, problem.value)
            output[at] = result.to(output.dtype)
            _write_rows(problem, panel, out, at, result, features)
            _add_columns(problem, panel, out)
            blocks.add(panel)
            if groups is not None:
                _write_groups(problem, panel, groups, at)
        blocks.write(out)
    return BackendResult(output, out, groups)


def _fills(problem: Problem) -> dict[str, float]:
    """What each statistic starts from."""
    names = {name for name in problem.statistics if not STATISTICS[name].from_backward} | {"lse"}
    low = {"lse", "max_logit", "block_max_logit"}
    return {name: -_INF if name in low else 0.0 for name in sorted(names)}


@dataclass(frozen=True, eq=False)
class _Strip:
    """One query block of some heads of one batch row, with the key blocks that it visits.

    Attributes:
        rows: its panels.
        columns: [C] key indices, whole blocks; those past the last key are hidden from every row.
        stored: `columns` held inside the keys, to read by.
    """

    batch: int
    kv_heads: slice
    heads: slice
    block: int
    rows: list[slice]
    key_blocks: Tensor
    columns: Tensor
    stored: Tensor


def _strips(problem: Problem) -> Iterator[_Strip]:
    rows, width = problem.block_size
    share = problem.heads // problem.kv_heads
    ranges = problem.plan.ranges(rows)
    mask = None
    if problem.block_mask is not None:
        mask = problem.block_mask.expand(problem.batch, problem.heads, -1, -1).cpu()
    per_head = problem.block_mask is not None and problem.block_mask.shape[1] > 1
    inside = torch.arange(width, device=problem.device)
    for batch in range(problem.batch):
        for block, (first, end) in enumerate(ranges[batch]):
            start, stop = block * rows, min((block + 1) * rows, problem.queries)
            in_range = torch.arange(first // width, -(-end // width))
            together = BUDGET // (share * (stop - start) * max(1, len(in_range) * width))
            step = 1 if per_head else max(1, together)
            for kv_head in range(0, problem.kv_heads, step):
                last = min(kv_head + step, problem.kv_heads)
                heads = slice(kv_head * share, last * share)
                kept = in_range
                if mask is not None:
                    kept = in_range[mask[batch, heads, block].any(0)[in_range]]
                if not len(kept):
                    continue
                height = max(1, BUDGET // (share * (last - kv_head) * len(kept) * width))
                key_blocks = kept.to(problem.device)
                columns = (key_blocks[:, None] * width + inside).flatten()
                yield _Strip(
                    batch,
                    slice(kv_head, last),
                    heads,
                    block,
                    [slice(at, min(at + height, stop)) for at in range(start, stop, height)],
                    key_blocks,
                    columns,
                    columns.clamp(max=problem.keys - 1),
                )


class _Panel:
    """The logits and probabilities of some rows of a strip.

    Attributes:
        scores: `s` [H, R, C], -inf where hidden.
        probability: `P` [H, R, C].
        lse: [H, R].
    """

    def __init__(self, problem: Problem, strip: _Strip, rows: slice) -> None:
        self.problem, self.strip, self.rows = problem, strip, rows
        self.scores = self._logits()
        sinks = problem.sink_logits
        self.probability, self.lse = _softmax(
            self.scores, None if sinks is None else sinks[strip.heads].detach()
        )

    def read(self, tensor: Tensor) -> Tensor:
        """The strip's keys of [batch, kv_heads, keys, D], as [G, C, D] in the compute type."""
        strip = self.strip
        part = tensor[strip.batch, strip.kv_heads]
        return part.index_select(1, strip.stored).to(self.problem.compute_dtype)

    def times(self, weight: Tensor, tensor: Tensor) -> Tensor:
        """`weight` [H, R, C] @ `tensor` [batch, kv_heads, keys, D], by kv head: [H, R, D]."""
        keys = self.read(tensor)
        grouped = weight.reshape(keys.shape[0], -1, weight.shape[-1])
        return (grouped @ keys).view(*weight.shape[:2], keys.shape[-1])

    def _logits(self) -> Tensor:
        problem, strip, plan, rows = self.problem, self.strip, self.problem.plan, self.rows
        query = problem.query[strip.batch, strip.heads, rows].to(problem.compute_dtype)
        key = self.read(problem.key)
        grouped = query.reshape(key.shape[0], -1, problem.head_dim)
        scores = (grouped @ key.transpose(-1, -2)).mul_(problem.scale)
        scores = scores.view(*query.shape[:2], -1)
        if problem.softcap is not None:
            scores = scores.div_(problem.softcap).tanh_().mul_(problem.softcap)
        if plan.bias is not None:
            scores = scores + self._part(plan.bias)
        if plan.slopes is not None:
            scores = scores - plan.slopes[strip.heads, None, None] * self.distance().abs()
        return scores.masked_fill_(~self._visible(), -_INF)

    def _visible(self) -> Tensor:
        """bool, broadcastable to [H, R, C]."""
        problem, strip, plan = self.problem, self.strip, self.problem.plan
        at = (strip.batch, self.rows, None)
        seen = (plan.low[at] <= strip.columns) & (strip.columns < plan.high[at])
        if plan.keep is not None:
            seen = seen & plan.keep[strip.batch, strip.stored]
        if plan.allowed is not None:
            seen = seen & self._part(plan.allowed)
        if problem.block_mask is not None:
            mask = problem.block_mask.expand(problem.batch, problem.heads, -1, -1)
            kept = mask[strip.batch, strip.heads, strip.block][:, strip.key_blocks]
            seen = seen & kept.repeat_interleave(problem.block_size[1], -1)[:, None]
        return seen

    def _part(self, tensor: Tensor) -> Tensor:
        """This panel of [batch | 1, heads | 1, queries | 1, keys], broadcastable to [H, R, C]."""
        problem, strip = self.problem, self.strip
        full = tensor.expand(problem.batch, problem.heads, problem.queries, -1)
        return full[strip.batch, strip.heads, self.rows].index_select(-1, strip.stored)

    def distance(self) -> Tensor:
        """`anchor - j` [R, C] in the compute type."""
        anchor = self.problem.plan.anchor[self.strip.batch, self.rows, None]
        return (anchor - self.strip.columns).to(self.problem.compute_dtype)

    def by_block(self, matrix: Tensor) -> Tensor:
        """[H, R, C] as [H, R, key blocks, width]."""
        return matrix.unflatten(-1, (-1, self.problem.block_size[1]))


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """`P` [H, R, C] and LSE [H, R]; rows without keys are 0 and -inf, also with a learned sink."""
    top = scores.amax(-1, keepdim=True)
    seen = top > -_INF
    if sinks is not None:
        top = torch.maximum(top, sinks[:, None, None])
    pivot = torch.where(seen, top, 0)
    weight = torch.exp(scores - pivot)
    total = weight.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - pivot)
    total = torch.where(seen, total, 1)
    lse = torch.where(seen, pivot + total.log(), -_INF)
    return weight.div_(total), lse.squeeze(-1)


def _write_rows(
    problem: Problem,
    panel: _Panel,
    out: dict[str, Tensor],
    at: tuple[int, slice, slice],
    result: Tensor,
    features: tuple[Tensor, dict[str, slice]],
) -> None:
    """The statistics with one number per query row; `result` is the panel's output."""
    strip, probability = panel.strip, panel.probability
    out["lse"][at] = panel.lse
    if problem.wants("max_logit"):
        out["max_logit"][at] = panel.scores.amax(-1)
    if problem.wants("entropy"):
        out["entropy"][at] = torch.special.entr(probability).sum(-1)
    if problem.wants("concentration"):
        out["concentration"][at] = probability.square().sum(-1)
    if problem.wants("distance"):
        out["distance"][at] = (probability * panel.distance()).sum(-1)
    if problem.wants("value_norm"):
        out["value_norm"][at] = result.norm(dim=-1)
    if features[1]:
        means = panel.times(probability, features[0])
        for name, place in features[1].items():
            out[name][at] = means[..., place].reshape(out[name][at].shape)
    if problem.wants("match_mass"):
        assert problem.query_labels is not None
        assert problem.key_labels is not None
        row = problem.query_labels[strip.batch, panel.rows]
        column = problem.key_labels[strip.batch].index_select(0, strip.stored)
        for pair in range(row.shape[-1]):
            label = row[:, None, pair]
            equal = (label == column[:, pair]) & (label >= 0)
            out["match_mass"][(*at, pair)] = (probability * equal).sum(-1)


def _add_columns(problem: Problem, panel: _Panel, out: dict[str, Tensor]) -> None:
    """Received mass, and the mass at each distance."""
    strip = panel.strip
    if problem.wants("received"):
        received = out["received"][strip.batch, strip.heads]
        received.index_add_(1, strip.stored, panel.probability.sum(1))
    if problem.wants("diagonal"):
        diagonal = out["diagonal"][strip.batch, strip.heads]
        place, mass = _diagonals(problem, panel)
        diagonal.index_add_(1, place, mass)


def _diagonals(problem: Problem, panel: _Panel) -> tuple[Tensor, Tensor]:
    """Sums along the diagonals of each key block: their place in `diagonal` [T], mass [H, T].

    Row `r` of a block is laid `rows - 1 - r` places to the right in a wider buffer, so that a
    diagonal becomes a column.
    """
    blocks = panel.by_block(panel.probability).transpose(1, 2)  # [H, blocks, R, width]
    heads, count, rows, width = blocks.shape
    span = rows + width
    buffer = blocks.new_zeros(heads, count, rows * span)
    shifted = buffer.as_strided(
        blocks.shape,
        (count * rows * span, rows * span, span - 1, 1),
        buffer.storage_offset() + rows - 1,
    )
    shifted.copy_(blocks)
    mass = buffer.view(heads, count, rows, span).sum(2)
    first = problem.plan.anchor[panel.strip.batch, panel.rows.start]
    start = panel.strip.columns[::width, None]
    column = torch.arange(span, device=problem.device)
    distance = first - start + rows - 1 - column  # [blocks, span]
    place = (distance - problem.diagonal_start).clamp(0, problem.distances - 1)
    return place.flatten(), mass.flatten(1)


class _BlockSums:
    """One row of the block maps: of one strip, summed over its panels."""

    def __init__(self, problem: Problem, strip: _Strip) -> None:
        self.problem, self.strip = problem, strip
        heads = strip.heads.stop - strip.heads.start
        zeros = problem.query.new_zeros((heads, len(strip.key_blocks)), dtype=problem.compute_dtype)
        self.seen = zeros.new_zeros(heads)
        self.mass, self.weighted, self.largest = zeros, zeros.clone(), zeros.clone()
        self.largest_logit = torch.full_like(zeros, -_INF)

    def add(self, panel: _Panel) -> None:
        problem, strip = self.problem, self.strip
        probability = panel.by_block(panel.probability)
        self.seen += (panel.lse > -_INF).sum(-1)
        if problem.wants("block_mass", "top_keys", "top_mass"):
            self.mass += probability.sum((1, 3))
        if problem.wants("block_max"):
            self.largest = torch.maximum(self.largest, probability.amax((1, 3)))
        if problem.wants("block_max_logit"):
            logit = panel.by_block(panel.scores).amax((1, 3))
            self.largest_logit = torch.maximum(self.largest_logit, logit)
        if problem.wants("block_weighted"):
            assert problem.key_weights is not None
            weights = problem.key_weights[strip.batch, strip.heads].index_select(1, strip.stored)
            mass = panel.probability.sum(1) * weights
            self.weighted += mass.unflatten(-1, (-1, problem.block_size[1])).sum(-1)

    def write(self, out: dict[str, Tensor]) -> None:
        problem, strip = self.problem, self.strip
        at = (strip.batch, strip.heads, strip.block)
        count = self.seen.clamp(min=1)[:, None]
        parts = {
            "block_mass": self.mass / count,
            "block_weighted": self.weighted / count,
            "block_max": self.largest,
            "block_max_logit": self.largest_logit,
        }
        for name, part in parts.items():
            if problem.wants(name):
                out[name][at].index_copy_(1, strip.key_blocks, part)
        if problem.wants("top_keys", "top_mass"):
            whole = self.mass.new_zeros(len(count), problem.key_blocks)
            whole.index_copy_(1, strip.key_blocks, parts["block_mass"])
            top, mass = top_blocks(whole, problem.top_k)
            for name, part in (("top_keys", top), ("top_mass", mass)):
                if problem.wants(name):
                    out[name][at] = part


def _write_groups(
    problem: Problem, panel: _Panel, groups: AttentionGroups, at: tuple[int, slice, slice]
) -> None:
    """The state of each key group, each with its own row maximum."""
    assert problem.groups is not None
    member = problem.groups[panel.strip.batch].index_select(0, panel.strip.stored)
    for group in range(problem.group_count):
        scores = panel.scores.masked_fill(member != group, -_INF)
        probability, lse = _softmax(scores, None)
        groups.output[(group, *at)] = panel.times(probability, problem.value)
        groups.lse[(group, *at)] = lse
