"""`weighted_attention`: output, statistics and gradients of attention whose weights are no softmax.

`W` are the weights of `normalisers.py`; they need not sum to 1 and may be negative. `S = |W| / sum |W|` is
the share of a key in its row. Rows are computed in panels of at most `BUDGET` weights, and again in the
backward pass, so that no N x N is kept. Where the whole is made of softmaxes (`OffByOne`, `Differential`)
and the numbers asked for are sums of `W`, the backends of `attention` compute it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.api import run_problem
from lens_kernels.arguments import without_autocast
from lens_kernels.nonfinite import guarded
from lens_kernels.normalisers import (
    Differential,
    Normaliser,
    OffByOne,
    check_normaliser,
    number_of,
)
from lens_kernels.problem import BackendResult, Problem
from lens_kernels.statistics import resolve_statistics
from lens_kernels.types import AttentionMask, AttentionResult, AttentionStatistics
from lens_kernels.validation import DIFFERENTIABLE, make_problem
from lens_kernels.weighted_panels import WEIGHT_STATISTICS, Work, by_panels, halves
from lens_kernels.weighted_reference import run_reference

if TYPE_CHECKING:
    from jaxtyping import Float

    from lens_kernels.labels import LabelPairs

_SUMS = frozenset({"prefix_mass", "match_mass", "value_norm", "received", "diagonal", "block_mass"})
"""Those that the backends of `attention` give for weights made of softmaxes."""
_BACKENDS = ("auto", "torch", "reference")


@without_autocast
def weighted_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    normaliser: Normaliser,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    block_size: int | tuple[int, int] = 64,
    statistics: str | Iterable[str] = (),
    match: LabelPairs | None = None,
    prefix: int = 4,
    backend: str = "auto",
) -> AttentionResult:
    """Attention with the weights of a normaliser, and exact statistics of them, without N x N.

    `s` as in `attention`. What each number is stands in `lens_kernels.weighted_panels.WEIGHT_STATISTICS`. A row
    that sees no key has output 0 and every number 0. A row that sees a key with a NaN or an infinity in it
    is NaN; what no query sees leaves no trace. Gradients reach query, key, value and the numbers of the
    normaliser, through the output and every statistic that is not a count.

    Args:
        query, key, value: as in `attention`; for `Differential` both maps side by side in the last axis.
        normaliser: `OffByOne()`, `Sigmoid()`, `Relu()` or `Differential(lambda)`, of
            `lens_kernels.normalisers`.
        mask, scale, softcap, block_size, match, prefix: as in `attention`.
        statistics: names, or "all" for everything that the given arguments allow.
        backend: "auto", "torch" (panels, never `attention`) or "reference" (float64, for small sizes).

    Raises:
        TypeError, ValueError: as `attention` does, and for a normaliser that is none.

    Example:
        >>> import torch
        >>> from lens_kernels.normalisers import Sigmoid
        >>> key = torch.zeros(1, 1, 4, 8)
        >>> result = weighted_attention(key, key, key, Sigmoid(bias=0.0), statistics=("row_sum",),
        ...                             mask=AttentionMask(causal=True))
        >>> result.statistics.row_sum.tolist()
        [[[0.5, 1.0, 1.5, 2.0]]]
    """
    check_normaliser(normaliser, query)
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; use {', '.join(_BACKENDS)}")
    if scale is None and isinstance(normaliser, Differential):
        scale = (query.shape[-1] // 2) ** -0.5
    problem = make_problem(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        softcap=softcap,
        block_size=block_size,
        statistics=(),
        match=match,
        prefix=prefix,
    )
    names = resolve_statistics(
        statistics,
        frozenset() if match is None else frozenset({"match"}),
        WEIGHT_STATISTICS,
        " of weights that are no softmax",
    )
    work = Work(normaliser, names, problem.keys, _number(normaliser, problem))
    if backend == "reference":
        result = guarded(
            problem, lambda one: run_reference(one, normaliser, names), WEIGHT_STATISTICS
        )
    elif backend == "auto" and _softmaxes_suffice(problem, work):
        result = _by_softmax(problem, work)
        backend = "softmax"
    else:
        result = guarded(problem, lambda one: by_panels(one, work), WEIGHT_STATISTICS)
        backend = "torch"
    found = AttentionStatistics(
        {name: result.tensors[name] for name in WEIGHT_STATISTICS if name in names},
        block_size=problem.block_size,
        diagonal_start=problem.diagonal_start,
    )
    return AttentionResult(result.output, found, None, backend)


def _number(normaliser: Normaliser, problem: Problem) -> Tensor:
    number = number_of(normaliser, problem.keys)
    found = torch.as_tensor(number, dtype=problem.compute_dtype, device=problem.device)
    return found.reshape(-1, 1, 1)


def _softmaxes_suffice(problem: Problem, work: Work) -> bool:
    """Whether `attention` gives all that is asked for, with its gradients."""
    differentiable = _SUMS & {"value_norm", *DIFFERENTIABLE}
    gives = differentiable if problem.needs_gradients else _SUMS
    return isinstance(work.normaliser, OffByOne | Differential) and work.names <= gives


def _by_softmax(problem: Problem, work: Work) -> BackendResult:
    """Sums of weights that are made of softmaxes, from as many calls of `attention`'s backends."""
    asked = (work.names - {"value_norm"}) | {"lse"}
    problem = replace(problem, statistics=asked, differentiable=asked & DIFFERENTIABLE)
    if isinstance(work.normaliser, OffByOne):
        sinks = torch.zeros(problem.heads, dtype=problem.compute_dtype, device=problem.device)
        result = run_problem(replace(problem, sink_logits=sinks))
        tensors = dict(result.statistics)
        output = result.output
    else:
        first, second = (run_problem(half) for half in halves(problem))
        tensors = {
            name: tensor - _wide(work.number, tensor) * second.statistics[name]
            for name, tensor in first.statistics.items()
            if name != "lse"
        }
        output = (first.output - work.number * second.output).to(problem.query.dtype)
    tensors["value_norm"] = output.to(problem.compute_dtype).norm(dim=-1)
    return BackendResult(output, tensors)


def _wide(number: Tensor, tensor: Tensor) -> Tensor:
    """[1 | heads, 1, 1] broadcastable to [batch, heads, ...]."""
    return number.reshape(-1, *[1] * (tensor.dim() - 2))
