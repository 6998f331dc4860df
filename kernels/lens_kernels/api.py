"""The entrance: `attention` and `explain`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, Unpack

from torch import Tensor

from lens_kernels.arguments import without_autocast
from lens_kernels.backward import attach
from lens_kernels.dispatch import Explanation, choose, choose_gradients, explain_problem, load
from lens_kernels.nonfinite import guarded
from lens_kernels.problem import BackendResult, Problem
from lens_kernels.slices import Seen
from lens_kernels.types import AttentionMask, AttentionResult, AttentionStatistics
from lens_kernels.validation import make_problem

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from lens_kernels.labels import LabelPairs
    from lens_kernels.validation import KeyWeights


@without_autocast
def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, "heads"] | None = None,
    block_size: int | tuple[int, int] = 64,
    statistics: str | Iterable[str] = ("lse",),
    match: LabelPairs | None = None,
    prefix: int = 4,
    top_k: int = 8,
    grid: tuple[int, ...] | None = None,
    groups: Int[Tensor, "batch keys"] | None = None,
    group_outputs: bool = True,
    block_mask: Bool[Tensor, "#batch #heads query_blocks key_blocks"] | None = None,
    key_weights: KeyWeights | None = None,
    differentiable: Iterable[str] = (),
    backend: str = "auto",
) -> AttentionResult:
    """Softmax attention and statistics of its probabilities, without ever storing them all.

    `s = cap(scale * q.k) + bias`, `P = exp(s - lse)` over the visible keys, `output = P v`. Extra
    memory is O(positions * dim + blocks^2) per head (the reference backend excepted). Statistics
    are in natural logarithms and float32 (float64 for float64 inputs); what each one is stands in
    `lens_kernels.STATISTICS`. A row that sees no key has output 0, LSE and max_logit -inf, every
    other number 0, and is left out of block means. A row that sees a key with a NaN or an infinity
    in it is NaN; what no query sees leaves no trace (`lens_kernels/nonfinite.py`).

    Args:
        query: [batch, heads, queries, head_dim]; float16, bfloat16, float32 or float64.
        key: [batch, kv_heads, keys, head_dim]; heads is a multiple of kv_heads (GQA).
        value: [batch, kv_heads, keys, value_dim].
        mask: which keys each query sees; None: all.
        scale: factor of the logits; None: 1 / sqrt(head_dim).
        softcap: `s = softcap * tanh(s / softcap)` before bias and mask (Gemma 2).
        sink_logits: [heads], a learned logit in each row's denominator whose value is 0 (gpt-oss).
        block_size: of the block maps, one integer or (query_block, key_block).
        statistics: names, or "all" for everything that the given arguments allow, or ().
        match: pairs (query_labels, key_labels) for `match_mass`, integers [queries] and [keys], or
            with a batch axis in front; negative labels never match.
        prefix: `prefix_mass` covers this many first keys of each sequence.
        top_k: number of key blocks in `top_keys`.
        grid: (height, width[, first key]) of the image keys, for `grid_moments`.
        groups: integers 0..3 [batch, keys]: one attention state per group of keys, from one pass.
        group_outputs: False where only their LSE and statistics are wanted: `groups.output` then
            has no columns, and its memory is not taken.
        block_mask: bool [batch | 1, heads | 1, query_blocks, key_blocks]: only True blocks are
            visited, the rest is as if masked.
        key_weights: [batch, heads | kv_heads, keys] for `block_weighted`; no gradient to them.
        differentiable: of "entropy", "block_mass", "received": those that gradients shall flow
            through, beside output and lse.
        backend: "auto", "cpu", "triton", "torch" or "reference"; see `explain`.

    Raises:
        TypeError, ValueError: one line that says what was expected, what came and what to do.

    Example:
        >>> import torch
        >>> query = key = value = torch.zeros(1, 1, 4, 8)
        >>> result = attention(query, key, value, mask=AttentionMask(causal=True),
        ...                    statistics=("entropy", "received"), block_size=2)
        >>> result.statistics.entropy.exp().round().tolist()
        [[[1.0, 2.0, 3.0, 4.0]]]
    """
    problem = make_problem(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        block_size=block_size,
        statistics=statistics,
        match=match,
        prefix=prefix,
        top_k=top_k,
        grid=grid,
        groups=groups,
        group_outputs=group_outputs,
        block_mask=block_mask,
        key_weights=key_weights,
        differentiable=differentiable,
    )
    parts = {} if mask is None else vars(mask)
    seen = Seen.of(
        parts, problem.keys, sinks=sink_logits is not None, blocks=block_mask is not None
    )
    return replace(run_problem(problem, backend), seen=seen)


def run_problem(problem: Problem, backend: str = "auto") -> AttentionResult:
    """Runs a validated problem, `backend` as in `attention`, with gradients where inputs ask for them."""
    chosen = choose(problem, backend)
    return finish(problem, guarded(problem, load(chosen).run), chosen)


def finish(problem: Problem, result: BackendResult, backend: str) -> AttentionResult:
    """Attaches gradients to what a backend returned, and packs it for the user."""
    groups = result.groups
    if groups is not None and not problem.group_outputs and groups.output.shape[-1]:
        result = replace(
            result, groups=replace(groups, output=groups.output.new_empty(*groups.lse.shape, 0))
        )
    compute, _ = choose_gradients(problem, backend)
    if compute is not None:
        result = attach(problem, result, compute)
    return _package(problem, result, backend)


def _package(problem: Problem, result: BackendResult, backend: str) -> AttentionResult:
    asked = {name: tensor for name, tensor in result.tensors.items() if name in problem.statistics}
    statistics = AttentionStatistics(
        asked,
        block_size=problem.block_size,
        diagonal_start=problem.diagonal_start,
        block_sparse=problem.block_mask is not None,
        from_backward=result.from_backward,
    )
    return AttentionResult(result.output, statistics, result.groups, backend)


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of `attention` other than `backend`."""

    mask: AttentionMask | None
    scale: float | None
    softcap: float | None
    sink_logits: Float[Tensor, "heads"] | None
    block_size: int | tuple[int, int]
    statistics: str | Iterable[str]
    match: LabelPairs | None
    prefix: int
    top_k: int
    grid: tuple[int, ...] | None
    groups: Int[Tensor, "batch keys"] | None
    group_outputs: bool
    block_mask: Bool[Tensor, "#batch #heads query_blocks key_blocks"] | None
    key_weights: KeyWeights | None
    differentiable: Iterable[str]


def explain(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> Explanation:
    """Which backend `attention` would run with the same arguments, and why not each other one.

    Raises:
        TypeError, ValueError: as `attention` does.

    Example:
        >>> import torch
        >>> query = key = value = torch.zeros(1, 1, 4, 8)
        >>> explain(query, key, value, backend="reference").chosen
        'reference'
    """
    return explain_problem(make_problem(query, key, value, **options), backend)
