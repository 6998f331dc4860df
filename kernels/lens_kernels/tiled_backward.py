"""The backward pass in plain torch, panel by panel, with what it can say about the attention.

For a loss with gradients `dO` (output), `h` (LSE), `g` (entropy), `G` (block mass, divided by the
seen rows of its block) and `c` (received mass), on probabilities `P = exp(s - lse)`:

    dP_ij  = dO_i . v_j + G_IJ + c_j - g_i (log P_ij + 1)
    dS_ij  = P_ij (dP_ij - D_i + h_i),         D_i = sum_j P_ij dP_ij
    dsink  = sum_i P_i,sink (h_i - D_i)

and a group state adds its own `P^g (dP^g - D^g + h^g)` on its keys. A panel holds whole rows, so
`D` is a sum and needs neither the output nor a second pass. Extra memory is O(positions * dim).

The exports take `a_ij = dO_i . v_j`, the gradient of `P` through the output alone:

    block_attribution         sum P a
    row_attribution           dO . O = sum_j P a = A_i
    block_influence           sum P (A - a) / (1 - P): masking one key and renormalising, to first
                              order downstream of the output (MoA); exact for a linear loss
    block_logit_gradient      sum dS
    block_logit_gradient_abs  sum |dS|
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lens_kernels.backward import Gradients, Saved, Upstream
from lens_kernels.complements import complements, removal_effect
from lens_kernels.panels import Panel, exponentials, sink_share, strips
from lens_kernels.problem import statistic_shape
from lens_kernels.states import seen_rows
from lens_kernels.statistics import STATISTICS

_INF = float("inf")


@torch.no_grad()
def gradients(saved: Saved, upstream: Upstream) -> Gradients:
    """Gradients of the inputs that are wanted, and the statistics `from_backward` asked for."""
    problem = saved.problem
    sums = _Sums(saved)
    per_row = None  # gradient of the block mass, spread over the rows that its mean runs over
    if upstream.block_mass is not None:
        count = seen_rows(saved.lse > -_INF, problem.block_size[0])
        per_row = upstream.block_mass / count[..., None]
    for strip in strips(problem):
        for rows in strip.rows:
            panel = Panel(problem, strip, rows, saved.lse[strip.batch, strip.heads, rows])
            through_output = _through_output(panel, upstream.output)
            of_probability = _of_probability(panel, through_output, upstream, per_row)
            row_sum = (panel.probability * of_probability).sum(-1)
            of_lse = _part(upstream.lse, panel)
            level = -row_sum if of_lse is None else of_lse - row_sum
            of_logits = panel.probability * (of_probability + level[..., None])
            sums.add_sinks(panel, level)
            sums.add_value(panel, panel.probability, _part(upstream.output, panel))
            _add_groups(saved, upstream, panel, of_logits, sums)
            sums.add_logits(panel, of_logits)
            sums.add_exports(panel, through_output, of_logits)
    return sums.result()


def _through_output(panel: Panel, of_output: Tensor | None) -> Tensor:
    """`dO . v` [H, R, C]."""
    part = _part(of_output, panel)
    if part is None:
        return torch.zeros_like(panel.probability)
    return panel.products(part, panel.problem.value)


def _of_probability(
    panel: Panel, through_output: Tensor, upstream: Upstream, per_row: Tensor | None
) -> Tensor:
    """`dP` [H, R, C]."""
    strip = panel.strip
    total = through_output
    if per_row is not None:
        blocks = per_row[strip.batch, strip.heads, strip.block][:, strip.key_blocks]
        total = total + blocks.repeat_interleave(panel.problem.block_size[1], -1)[:, None]
    if upstream.received is not None:
        received = upstream.received[strip.batch, strip.heads]
        total = total + received.index_select(-1, strip.stored)[:, None]
    if upstream.entropy is not None:
        of_entropy = upstream.entropy[strip.batch, strip.heads, panel.rows, None]
        logarithm = torch.where(panel.probability > 0, panel.probability, 1).log()
        total = total - of_entropy * (logarithm + 1)
    return total


def _add_groups(
    saved: Saved, upstream: Upstream, panel: Panel, of_logits: Tensor, sums: _Sums
) -> None:
    """Adds to `of_logits` what flows through the group states."""
    if upstream.group_output is None and upstream.group_lse is None:
        return
    problem, strip = panel.problem, panel.strip
    assert saved.group_lse is not None
    assert problem.groups is not None
    member = problem.groups[strip.batch].index_select(0, strip.stored)
    for group in range(problem.group_count):
        lse = saved.group_lse[group, strip.batch, strip.heads, panel.rows]
        scores = panel.scores.masked_fill(member != group, -_INF)
        probability = exponentials(scores, lse)
        of_output = None if upstream.group_output is None else upstream.group_output[group]
        through = _through_output(panel, of_output)
        level = -(probability * through).sum(-1)
        if upstream.group_lse is not None:
            of_lse = _part(upstream.group_lse[group], panel)
            assert of_lse is not None
            level = level + of_lse
        of_logits += probability * (through + level[..., None])
        sums.add_value(panel, probability, _part(of_output, panel))


def _influence(panel: Panel, through: Tensor) -> Tensor:
    """Effect of masking each key alone and renormalising [H, R, C]."""
    probability = panel.probability
    room, gap = complements(probability, through, sink_share(panel))
    return removal_effect(probability, through, room, gap)


def _part(tensor: Tensor | None, panel: Panel) -> Tensor | None:
    """The panel's rows of [batch, heads, queries, ...], in the compute type."""
    if tensor is None:
        return None
    part = tensor[panel.strip.batch, panel.strip.heads, panel.rows]
    return part.to(panel.problem.compute_dtype)


class _Sums:
    """Gradients and exports under construction."""

    def __init__(self, saved: Saved) -> None:
        problem = self.problem = saved.problem
        dtype = problem.compute_dtype

        def zeros(name: str, tensor: Tensor | None) -> Tensor | None:
            if name not in saved.wanted or tensor is None:
                return None
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

        self.query = zeros("query", problem.query)
        self.key = zeros("key", problem.key)
        self.value = zeros("value", problem.value)
        self.sink_logits = zeros("sink_logits", problem.sink_logits)
        self.bias = zeros("bias", problem.plan.bias)
        self.exports = {
            name: problem.query.new_zeros(statistic_shape(problem, name), dtype=dtype)
            for name in sorted(problem.statistics)
            if STATISTICS[name].from_backward
        }

    def add_sinks(self, panel: Panel, level: Tensor) -> None:
        share = sink_share(panel)
        if self.sink_logits is not None and share is not None:
            self.sink_logits[panel.strip.heads] += (share * level).sum(-1)

    def add_value(self, panel: Panel, probability: Tensor, of_output: Tensor | None) -> None:
        if self.value is not None and of_output is not None:
            self._add_keys(self.value, panel, probability, of_output)

    def add_logits(self, panel: Panel, of_logits: Tensor) -> None:
        """Carries `dS` on to bias, query and key."""
        problem, strip = self.problem, panel.strip
        if self.bias is not None:
            self._add_bias(self.bias, panel, of_logits)
        if self.query is None and self.key is None:
            return
        of_products = of_logits if panel.cap_slope is None else of_logits * panel.cap_slope
        of_products = of_products * problem.scale
        if self.query is not None:
            at = (strip.batch, strip.heads, panel.rows)
            self.query[at] = panel.times(of_products, problem.key)
        if self.key is not None:
            query = problem.query[strip.batch, strip.heads, panel.rows]
            self._add_keys(self.key, panel, of_products, query.to(of_products.dtype))

    def _add_keys(self, total: Tensor, panel: Panel, weight: Tensor, rows: Tensor) -> None:
        """Adds `weight' rows`, summed over the heads of a group, to the strip's keys."""
        strip = panel.strip
        count = strip.kv_heads.stop - strip.kv_heads.start
        grouped = weight.reshape(count, -1, weight.shape[-1]).transpose(-1, -2)
        part = grouped @ rows.reshape(count, -1, rows.shape[-1])
        total[strip.batch, strip.kv_heads].index_add_(1, strip.stored, part)

    def _add_bias(self, total: Tensor, panel: Panel, of_logits: Tensor) -> None:
        strip = panel.strip
        if total.shape[2] == 1:
            of_logits = of_logits.sum(1, keepdim=True)
        if total.shape[1] == 1:
            of_logits = of_logits.sum(0, keepdim=True)
        batch = 0 if total.shape[0] == 1 else strip.batch
        heads = slice(0, 1) if total.shape[1] == 1 else strip.heads
        rows = slice(0, 1) if total.shape[2] == 1 else panel.rows
        total[batch, heads, rows].index_add_(2, strip.stored, of_logits)

    def add_exports(self, panel: Panel, through: Tensor, of_logits: Tensor) -> None:
        strip = panel.strip
        attribution = panel.probability * through
        if "row_attribution" in self.exports:
            at = (strip.batch, strip.heads, panel.rows)
            self.exports["row_attribution"][at] = attribution.sum(-1)
        makers: dict[str, Callable[[], Tensor]] = {
            "block_attribution": lambda: attribution,
            "block_influence": lambda: _influence(panel, through),
            "block_logit_gradient": lambda: of_logits,
            "block_logit_gradient_abs": of_logits.abs,
        }
        for name, make in makers.items():
            if name in self.exports:
                total = self.exports[name][strip.batch, strip.heads, strip.block]
                total.index_add_(1, strip.key_blocks, panel.by_block(make()).sum((1, 3)))

    def result(self) -> Gradients:
        return Gradients(
            self.query, self.key, self.value, self.sink_logits, self.bias, self.exports
        )
