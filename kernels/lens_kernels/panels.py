"""Panels: the logits of some query rows against all the keys that they can see.

What plain torch computes block by block (forward, backward, effects of patches) is a loop over
panels of at most `BUDGET` logits, so `P` exists only panel by panel. A panel holds whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lens_kernels.problem import Problem

BUDGET = 1 << 21
"""Logits of one panel, all its heads together."""

_INF = float("inf")


@dataclass(frozen=True, eq=False)
class Strip:
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


def strips(problem: Problem) -> Iterator[Strip]:
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
            in_range = torch.arange(first // width, -(-end // width), device="cpu")
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
                yield Strip(
                    batch,
                    slice(kv_head, last),
                    heads,
                    block,
                    [slice(at, min(at + height, stop)) for at in range(start, stop, height)],
                    key_blocks,
                    columns,
                    columns.clamp(max=problem.keys - 1),
                )


class Panel:
    """The logits and probabilities of some rows of a strip.

    Attributes:
        scores: `s` [H, R, C], -inf where hidden.
        probability: `P` [H, R, C].
        lse: [H, R].
        cap_slope: d s / d (scale * q.k) [H, R, C], where `lse` was given and there is a softcap.
    """

    def __init__(
        self, problem: Problem, strip: Strip, rows: slice, lse: Tensor | None = None
    ) -> None:
        """`lse` [H, R]: of the whole rows, where it is known already."""
        self.problem, self.strip, self.rows = problem, strip, rows
        self.cap_slope: Tensor | None = None
        self.scores = self._logits(keep_slope=lse is not None)
        if lse is None:
            sinks = problem.sink_logits
            self.probability, self.lse = softmax(
                self.scores, None if sinks is None else sinks[strip.heads].detach()
            )
        else:
            self.lse = lse
            self.probability = exponentials(self.scores, self.lse)

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

    def products(self, rows: Tensor, tensor: Tensor) -> Tensor:
        """`rows` [H, R, D] . `tensor` [batch, kv_heads, keys, D], by kv head: [H, R, C]."""
        keys = self.read(tensor)
        grouped = rows.reshape(keys.shape[0], -1, keys.shape[-1])
        return (grouped @ keys.transpose(-1, -2)).view(*rows.shape[:2], keys.shape[1])

    def _logits(self, keep_slope: bool) -> Tensor:
        problem, strip, plan, rows = self.problem, self.strip, self.problem.plan, self.rows
        query = problem.query[strip.batch, strip.heads, rows].to(problem.compute_dtype)
        scores = self.products(query, problem.key).mul_(problem.scale)
        if problem.softcap is not None:
            scores = scores.div_(problem.softcap).tanh_()
            if keep_slope:
                self.cap_slope = 1 - scores.square()
            scores = scores.mul_(problem.softcap)
        if plan.bias is not None:
            scores = scores + self._part(plan.bias).to(scores.dtype)
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


def softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
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


def exponentials(scores: Tensor, lse: Tensor) -> Tensor:
    """`exp(s - lse)` of `scores` [..., R, C] and `lse` [..., R]; 0 in rows without keys."""
    total = lse.masked_fill(lse == -_INF, _INF)
    return torch.exp(scores - total[..., None])


def sink_share(panel: Panel) -> Tensor | None:
    """Mass of the learned sink [H, R], 0 in rows without keys; None where there is no sink."""
    sinks = panel.problem.sink_logits
    if sinks is None:
        return None
    return exponentials(sinks[panel.strip.heads, None, None], panel.lse).squeeze(-1)
