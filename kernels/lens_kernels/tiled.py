"""The backend `torch`: plain torch on any device, one panel of query rows at a time (panels.py).

A panel holds whole rows: the row maximum and the LSE come first and every statistic is a plain sum
or maximum of `P`, without any rescaling. Keys that a panel cannot see (causal, window, packing,
`block_mask`) are never read. It serves every problem and is the slow one: a compiled backend keeps
a tile in registers or cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels.panels import Panel, Strip, softmax, strips
from lens_kernels.problem import (
    BackendResult,
    Problem,
    group_statistics,
    row_features,
    statistic_shape,
    top_blocks,
)
from lens_kernels.statistics import STATISTICS
from lens_kernels.types import AttentionGroups

_INF = float("inf")


def supports(problem: Problem) -> str | None:
    """It can do everything, on any device."""
    return None


@torch.no_grad()
def run(problem: Problem, lse: Tensor | None = None) -> BackendResult:
    """Output, statistics and group states, panel by panel.

    `lse` [batch, heads, queries]: of the rows, where it is known already; +inf for rows that count nothing.
    """
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
            {
                name: output.new_full(shape[:-1], fill, dtype=problem.compute_dtype)
                for name, fill in _fills(problem).items()
                if name in group_statistics(problem)
            },
        )
    features = row_features(problem)
    for strip in strips(problem):
        blocks = _BlockSums(problem, strip)
        for rows in strip.rows:
            at = (strip.batch, strip.heads, rows)
            panel = Panel(problem, strip, rows, None if lse is None else lse[at])
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


def _write_rows(
    problem: Problem,
    panel: Panel,
    out: dict[str, Tensor],
    at: tuple[int, slice, slice],
    result: Tensor,
    features: tuple[Tensor, dict[str, slice]],
) -> None:
    """The statistics with one number per query row; `result` is the panel's output."""
    strip, probability = panel.strip, panel.probability
    out["lse"][at] = panel.lse
    for name in group_statistics(problem):
        out[name][at] = _plain(name, panel, panel.scores, probability)
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


def _plain(name: str, panel: Panel, scores: Tensor, probability: Tensor) -> Tensor:
    """A statistic of `group_statistics` [H, R], of the whole row or of one group in it."""
    match name:
        case "max_logit":
            return scores.amax(-1)
        case "entropy":
            return torch.special.entr(probability).sum(-1)
        case "concentration":
            return probability.square().sum(-1)
        case _:
            return (probability * panel.distance()).sum(-1)


def _add_columns(problem: Problem, panel: Panel, out: dict[str, Tensor]) -> None:
    """Received mass, and the mass at each distance."""
    strip = panel.strip
    if problem.wants("received"):
        received = out["received"][strip.batch, strip.heads]
        received.index_add_(1, strip.stored, panel.probability.sum(1))
    if problem.wants("diagonal"):
        diagonal = out["diagonal"][strip.batch, strip.heads]
        place, mass = _diagonals(problem, panel)
        diagonal.index_add_(1, place, mass)


def _diagonals(problem: Problem, panel: Panel) -> tuple[Tensor, Tensor]:
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

    def __init__(self, problem: Problem, strip: Strip) -> None:
        self.problem, self.strip = problem, strip
        heads = strip.heads.stop - strip.heads.start
        zeros = problem.query.new_zeros((heads, len(strip.key_blocks)), dtype=problem.compute_dtype)
        self.seen = zeros.new_zeros(heads)
        self.mass, self.weighted, self.largest = zeros, zeros.clone(), zeros.clone()
        self.largest_logit = torch.full_like(zeros, -_INF)

    def add(self, panel: Panel) -> None:
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
    problem: Problem, panel: Panel, groups: AttentionGroups, at: tuple[int, slice, slice]
) -> None:
    """The state of each key group, each with its own row maximum."""
    assert problem.groups is not None
    member = problem.groups[panel.strip.batch].index_select(0, panel.strip.stored)
    for group in range(problem.group_count):
        scores = panel.scores.masked_fill(member != group, -_INF)
        probability, lse = softmax(scores, None)
        groups.output[(group, *at)] = panel.times(probability, problem.value)
        groups.lse[(group, *at)] = lse
        for name, tensor in groups.statistics.items():
            tensor[(group, *at)] = _plain(name, panel, scores, probability)
