"""Exact effects of patching one query, key or value, or of knocking one out, all in one pass.

For a metric with gradient `dO` at the output of the heads, `g_it = dO_i . v_t`, `D_i = dO_i . o_i`
and `p_it = exp(s_it - lse_i)`. Each number is the change of the metric when that one thing changes
and everything else stays: exact inside attention (softmax recomputed), first order downstream of it.

    query i   dO_i . (o(q'_i, K, V) - o_i) = sum_t (p'_it - p_it) g_it
    key t     sum_i p (e^d - 1) (g - D) / (1 - p + p e^d),   d = s(q_i, k'_t) - s(q_i, k_t)
    value t   sum_i p dO_i . (v'_t - v_t)
    knock-out of key t, renormalised          sum_i -p (g - D) / (1 - p)
    dropping key t, without renormalising     sum_i -p g
    knock-out of key block B, by query block  sum_i (P_B D - G_B) / (1 - P_B),  P_B = sum p, G_B = sum p g

What attribution patching estimates, without its failure on saturated softmax (AtP*, arXiv
2403.00745, recomputes these one by one). The traffic is that of a backward pass, extra memory
O(positions * dim). For the effect on some rows only, set `dO` to 0 in the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.arguments import check_kinds, check_tensors, without_autocast
from lens_kernels.complements import complements, removal_effect
from lens_kernels.panels import Panel, sink_share, strips
from lens_kernels.problem import Problem
from lens_kernels.types import AttentionMask
from lens_kernels.validation import make_problem

if TYPE_CHECKING:
    from jaxtyping import Float

_HUGE = 1e30


@dataclass(frozen=True, eq=False)
class PatchEffects:
    """Changes of the metric, float32 (float64 for float64 inputs); None where nothing was given.

    Under GQA the effect of a key or value of a key-value head is the sum over the heads that read
    it.

    Attributes:
        query: [batch, heads, queries], each query alone replaced by its patched one.
        key: [batch, heads, keys], each key alone, for all queries that see it.
        value: [batch, heads, keys], each value alone.
        knock_out: [batch, heads, keys], each key alone hidden from all queries, rows renormalised.
            A row that sees no other key becomes empty (output 0).
        drop: [batch, heads, keys], what each key contributes taken away, not renormalised.
        block_knock_out: [batch, heads, query_blocks, key_blocks], each block of keys hidden from
            each block of queries, rows renormalised.
    """

    query: Float[Tensor, "batch heads queries"] | None
    key: Float[Tensor, "batch heads keys"] | None
    value: Float[Tensor, "batch heads keys"] | None
    knock_out: Float[Tensor, "batch heads keys"] | None
    drop: Float[Tensor, "batch heads keys"] | None
    block_knock_out: Float[Tensor, "batch heads query_blocks key_blocks"] | None


@torch.no_grad()
@without_autocast
def patch_effects(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    output_gradient: Float[Tensor, "batch heads queries value_dim"],
    *,
    patched_query: Float[Tensor, "batch heads queries head_dim"] | None = None,
    patched_key: Float[Tensor, "batch kv_heads keys head_dim"] | None = None,
    patched_value: Float[Tensor, "batch kv_heads keys value_dim"] | None = None,
    knock_out: bool = False,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, "heads"] | None = None,
    block_size: int | tuple[int, int] = 64,
) -> PatchEffects:
    """The effects of everything that is given; see the module for the formulas.

    Args:
        query, key, value: as for `attention`.
        output_gradient: `dO` [batch, heads, queries, value_dim], gradient of the metric with
            respect to the attention output.
        patched_query, patched_key, patched_value: replacements, of the shapes of what they replace.
        knock_out: also compute `knock_out`, `drop` and `block_knock_out`.
        mask, scale, softcap, sink_logits, block_size: as for `attention`.

    Raises:
        TypeError, ValueError: as `attention`, and for shapes that differ from what is patched.

    Example:
        >>> q = torch.zeros(1, 1, 1, 2)
        >>> k, v = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0], [3.0]]]])
        >>> patch_effects(q, k, v, torch.ones(1, 1, 1, 1), knock_out=True).knock_out
        tensor([[[ 1., -1.]]])
    """
    patches = {"query": patched_query, "key": patched_key, "value": patched_value}
    check_tensors(
        output_gradient=output_gradient, **{f"patched_{n}": p for n, p in patches.items()}
    )
    check_kinds(bool, knock_out=knock_out)
    problem = make_problem(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        block_size=block_size,
        statistics=(),
    )
    given = {name: patch for name, patch in patches.items() if patch is not None}
    if not given and not knock_out:
        raise ValueError(
            "nothing to compute: give patched_query, patched_key or patched_value, or knock_out=True"
        )
    originals = {"query": query, "key": key, "value": value}
    for name, patch in given.items():
        _check(f"patched_{name}", patch, originals[name].shape, query)
    shape = (*query.shape[:3], value.shape[3])
    _check("output_gradient", output_gradient, torch.Size(shape), query, any_dtype=True)
    with_patches = originals | given
    patched = make_problem(  # for its cleaned padding
        with_patches["query"], with_patches["key"], with_patches["value"], mask=mask
    )
    effects = _Effects(problem, patched, frozenset(given), knock_out)
    for strip in strips(problem):
        for rows in strip.rows:
            panel = Panel(problem, strip, rows)
            part = output_gradient[strip.batch, strip.heads, rows].to(problem.compute_dtype)
            effects.add(panel, part)
    return effects.result()


def _check(
    name: str, tensor: Tensor, shape: torch.Size, query: Tensor, any_dtype: bool = False
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != query.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the query on {query.device}; move it there"
        )
    if not any_dtype and tensor.dtype != query.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, the query {query.dtype}; convert one of them")


class _Effects:
    """The sums under construction."""

    def __init__(
        self, problem: Problem, patched: Problem, given: frozenset[str], knock_out: bool
    ) -> None:
        def zeros(*axes: int) -> Tensor:
            shape = (problem.batch, problem.heads, *axes)
            return problem.query.new_zeros(shape, dtype=problem.compute_dtype)

        self.patched_value = patched.value
        self.with_query = replace(problem, query=patched.query)
        self.with_key = replace(problem, key=patched.key)
        self.query = zeros(problem.queries) if "query" in given else None
        self.key = zeros(problem.keys) if "key" in given else None
        self.value = zeros(problem.keys) if "value" in given else None
        self.knock_out = zeros(problem.keys) if knock_out else None
        self.drop = zeros(problem.keys) if knock_out else None
        blocks = (problem.query_blocks, problem.key_blocks)
        self.block_knock_out = zeros(*blocks) if knock_out else None

    def add(self, panel: Panel, gradient: Tensor) -> None:
        """Adds the rows of a panel; `gradient` [H, R, value_dim] is their part of `dO`."""
        p, g = panel.probability, panel.products(gradient, panel.problem.value)
        if self.query is not None:
            other = Panel(self.with_query, panel.strip, panel.rows)
            at = (panel.strip.batch, panel.strip.heads, panel.rows)
            self.query[at] = ((other.probability - p) * g).sum(-1)
        if self.value is not None:
            change = panel.products(gradient, self.patched_value) - g
            self._to_keys(self.value, panel, p * change)
        share = sink_share(panel)
        if self.key is not None or self.knock_out is not None:
            room, gap = complements(p, g, share)
            if self.key is not None:
                self._to_keys(self.key, panel, self._of_key(panel, room, gap))
            if self.knock_out is not None:
                self._to_keys(self.knock_out, panel, removal_effect(p, g, room, gap))
        if self.drop is not None:
            self._to_keys(self.drop, panel, -p * g)
        if self.block_knock_out is not None:
            mass = panel.by_block(p).sum(-1)
            part = panel.by_block(p * g).sum(-1)
            mean = part / torch.where(mass > 0, mass, 1)  # the block's own D
            effect = removal_effect(mass, mean, *complements(mass, mean, share))
            strip = panel.strip
            total = self.block_knock_out[strip.batch, strip.heads, strip.block]
            total.index_add_(1, strip.key_blocks, effect.sum(1))

    def _of_key(self, panel: Panel, room: Tensor, gap: Tensor) -> Tensor:
        """`(p e^d - p) / (1 - p + p e^d) * (g - D)`, with `p e^d = exp(s' - lse)`."""
        other = Panel(self.with_key, panel.strip, panel.rows, panel.lse)
        grown = other.probability.clamp(max=_HUGE)
        total = room + grown
        return (grown - panel.probability) / torch.where(total > 0, total, 1) * gap

    def _to_keys(self, total: Tensor, panel: Panel, effect: Tensor) -> None:
        """Adds `effect` [H, R, C], summed over the rows, to [batch, heads, keys]."""
        strip = panel.strip
        total[strip.batch, strip.heads].index_add_(1, strip.stored, effect.sum(1))

    def result(self) -> PatchEffects:
        return PatchEffects(
            self.query, self.key, self.value, self.knock_out, self.drop, self.block_knock_out
        )
