"""Gradients through a backend's output, LSE, group states and the statistics opted in.

A backend computes on detached tensors; `attach` puts one autograd node behind what it returned. The
backward pass recomputes `P = exp(s - lse)` from q, k and LSE panel by panel (tiled_backward.py, or
the backend's own kernel), so that no matrix is kept between the passes. It also leaves what was
asked for of `block_attribution`, `row_attribution`, ... in `result.statistics`; each backward pass
overwrites them. Gradients of gradients are not there: take the reference backend for those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lens_kernels.arguments import without_autocast
from lens_kernels.problem import BackendResult, Problem
from lens_kernels.statistics import STATISTICS
from lens_kernels.types import AttentionGroups

_OPTIONAL = ("entropy", "block_mass", "received")


@dataclass(frozen=True, eq=False)
class Upstream:
    """Gradients of the loss with respect to what the forward pass returned; None where there is none.

    Attributes:
        output: [batch, heads, queries, value_dim].
        lse: [batch, heads, queries].
        entropy, block_mass, received: of the shapes of the statistics.
        group_output: [groups, batch, heads, queries, value_dim].
        group_lse: [groups, batch, heads, queries].
    """

    output: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    block_mass: Tensor | None = None
    received: Tensor | None = None
    group_output: Tensor | None = None
    group_lse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Saved:
    """What the forward pass leaves for the backward pass.

    Attributes:
        problem: on detached tensors.
        lse: [batch, heads, queries].
        group_lse: [groups, batch, heads, queries], or None.
        wanted: of "query", "key", "value", "sink_logits", "bias", those that need a gradient.
        output: [batch, heads, queries, value_dim], as returned; a kernel takes `dO . O` from it.
    """

    problem: Problem
    lse: Tensor
    group_lse: Tensor | None
    wanted: frozenset[str]
    output: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a backward pass returns: gradients of the inputs, and the statistics it exports.

    Attributes:
        query, key, value, sink_logits, bias: of the shape of each in `Problem`, in the compute
            type, None where it was not wanted.
        exports: name -> tensor of each of `problem.statistics` that is `from_backward`.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    exports: dict[str, Tensor] = field(default_factory=dict)


Compute = Callable[[Saved, Upstream], Gradients]


def attach(problem: Problem, result: BackendResult, compute: Compute) -> BackendResult:
    """`result` with an autograd node behind output, LSE, group states and opted-in statistics.

    Args:
        problem: what was run, its tensors still in the user's graph.
        result: what the backend returned.
        compute: the backward pass.
    """
    exports: dict[str, Tensor | None] = {
        name: None for name in sorted(problem.statistics) if STATISTICS[name].from_backward
    }
    node = _Node(problem, result, compute, exports)
    attached = _Attention.apply(
        node, problem.query, problem.key, problem.value, problem.sink_logits, problem.plan.bias
    )
    found = dict(zip((part.name for part in fields(Upstream)), attached, strict=True))
    tensors = dict(result.tensors)
    for name in ("lse", *_OPTIONAL):
        if found[name] is not None:
            tensors[name] = found[name]
    groups = result.groups
    if groups is not None:
        groups = AttentionGroups(found["group_output"], found["group_lse"], groups.statistics)
    return BackendResult(found["output"], tensors, groups, exports)


@dataclass(frozen=True, eq=False)
class _Node:
    """Everything of one call that is not an input of the graph."""

    problem: Problem
    result: BackendResult
    compute: Compute
    exports: dict[str, Tensor | None]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        node: _Node,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logits: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        problem, result = node.problem, node.result
        opted = {
            name: result.tensors[name]
            for name in _OPTIONAL
            if name in problem.differentiable and name in result.tensors
        }
        groups = result.groups
        lse = result.tensors["lse"]
        group_lse = None if groups is None else groups.lse
        ctx.save_for_backward(query, key, value, sink_logits, bias, result.output, lse, group_lse)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.compute, ctx.exports = _shell(problem), node.compute, node.exports
        return (
            result.output,
            lse,
            *(opted.get(name) for name in _OPTIONAL),
            None if groups is None else groups.output,
            group_lse,
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, sink_logits, bias, output, lse, group_lse = ctx.saved_tensors
        names = ("query", "key", "value", "sink_logits", "bias")
        needed = zip(names, ctx.needs_input_grad[1:], strict=True)
        problem = replace(
            ctx.problem,
            query=query,
            key=key,
            value=value,
            sink_logits=sink_logits,
            plan=replace(ctx.problem.plan, bias=bias),
        )
        wanted = frozenset(name for name, need in needed if need)
        upstream = Upstream(*(None if part is None else part.resolve_neg() for part in gradients))
        found = ctx.compute(Saved(problem, lse, group_lse, wanted, output), upstream)
        ctx.exports.update(found.exports)
        inputs = (query, key, value, sink_logits, bias)
        return (
            None,
            *(
                None if (part := getattr(found, name)) is None else part.to(tensor.dtype)
                for name, tensor in zip(names, inputs, strict=True)
            ),
        )


def _shell(problem: Problem) -> Problem:
    """The problem without the memory of its big inputs: autograd keeps and frees those."""

    def shell(tensor: Tensor) -> Tensor:
        return tensor.detach().new_empty(()).expand(tensor.shape)

    return replace(
        problem,
        query=shell(problem.query),
        key=shell(problem.key),
        value=shell(problem.value),
        sink_logits=None,
        plan=replace(problem.plan, bias=None),
    )
