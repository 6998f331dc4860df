"""Backend "triton": the kernels of triton_forward, triton_lse_pass and triton_backward on a GPU.

One forward pass for whatever is a sum along a row, then, where asked for, a pass along columns
(received mass, block maps) and one along diagonals. Key groups run as problems of their own
(groups.py), but a single key beside all others is one pass with the rest. Extra memory is that of the outputs; block masses that are only needed for `top_keys`
are made and dropped some heads at a time.

Under Triton's interpreter (TRITON_INTERPRET=1 before the first use) the same kernels run on the CPU
in float32 and float16, for tests. Triton is imported when a problem could be run, not before.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lens_kernels.backward import Gradients, Saved, Upstream
from lens_kernels.groups import lone_key, lone_states, run_by_group
from lens_kernels.problem import BackendResult, Problem, group_statistics
from lens_kernels.splits import PIECE, run_split

LARGEST_DIM = 256
PROGRAMS = 264
"""That one query is cut into: two for each multiprocessor of an H200."""
SHORTEST = 256
"""Keys of a piece: what a program loads before it is worth one, and a multiple of every tile."""


def supports(problem: Problem) -> str | None:
    """None when it can do all of `problem`, else the reason why not."""
    if not _installed():
        return "triton is not installed (pip install 'attention-lens[gpu]')"
    if problem.query.dtype == torch.float64:
        return "it computes in float32, and the inputs are torch.float64"
    if max(problem.head_dim, problem.value_dim) > LARGEST_DIM:
        return (
            f"head_dim {problem.head_dim} and value_dim {problem.value_dim} must be at most "
            f"{LARGEST_DIM}"
        )
    if problem.device.type == "cuda":
        return _gpu_obstacle(problem)
    if problem.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {problem.device}, not on a CUDA GPU"
    return _interpreter_obstacle(problem)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gpu_obstacle(problem: Problem) -> str | None:
    if torch.version.hip is not None:
        return "it is tested on NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if major < 8:
        return f"it needs compute capability 8.0 or more, and this GPU has {major}.{minor}"
    return _interpreter_obstacle(problem) if interpreted() else None


def _interpreter_obstacle(problem: Problem) -> str | None:
    if not interpreted():
        return "TRITON_INTERPRET was set after triton's kernels were loaded; set it before"
    if problem.query.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly without saying so"
    return None


def interpreted() -> bool:
    """Whether the kernels were decorated for the interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    from lens_kernels.triton_forward import forward

    return isinstance(forward, InterpretedFunction)


@torch.no_grad()
def run(problem: Problem) -> BackendResult:
    """Output, statistics and group states; see `lens_kernels.problem`.

    One query on many keys would be one program for each head, so its keys are cut into pieces.
    """
    if problem.queries == 1:
        piece = _piece(problem)
        if problem.groups is None and problem.block_mask is None and piece < problem.keys:
            return _run(problem, problem.query.dtype, piece=piece)
        width = problem.block_size[1]
        piece = max(1, PIECE // width) * width
        if problem.keys >= 2 * piece:
            return run_split(problem, run, piece)
    if problem.groups is not None:
        from lens_kernels.triton_configs import one_pass, split_rows

        apart = lone_key(problem, split_rows(problem)) if one_pass(problem) else None
        if apart is not None:
            return _run(problem, problem.query.dtype, apart)
        result = run_by_group(problem, lambda part: _run(part, part.compute_dtype))
        return replace(result, output=result.output.to(problem.query.dtype))
    return _run(problem, problem.query.dtype)


def _piece(problem: Problem) -> int:
    """Keys of a piece, so that there are about `PROGRAMS` in all."""
    pieces = -(-PROGRAMS // (problem.batch * problem.heads))
    return max(SHORTEST, -(-problem.keys // pieces // SHORTEST) * SHORTEST)


def _run(
    problem: Problem, dtype: torch.dtype, apart: Tensor | None = None, piece: int | None = None
) -> BackendResult:
    """`apart`: `lone_key` where the groups are made along with the rest; `piece`: as in `run_rows`."""
    from lens_kernels.triton_run import run_columns, run_diagonals, run_rows

    problem = _dense(problem)
    with _device(problem):
        output, tensors, beside = run_rows(problem, dtype, apart, piece)
        lse = tensors["lse"]
        tensors |= run_columns(problem, lse)
        tensors |= run_diagonals(problem, lse)
    if apart is None:
        return BackendResult(output, tensors)
    names = ("lse", *group_statistics(problem))
    others = {name: beside[name] for name in names}
    states = lone_states(problem, apart, beside["logit"], beside["output"], others)
    return BackendResult(output, tensors, states)


def _dense(problem: Problem) -> Problem:
    """Detached, and dense in memory where the kernels read without strides.

    The batch rows of a `decode` piece are views, and learned sinks may be a column of a matrix.
    """

    def dense(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().contiguous()

    plan = problem.plan
    parts = {name: getattr(plan, name).contiguous() for name in ("low", "high", "anchor")}
    parts |= {name: dense(getattr(plan, name)) for name in ("keep", "slopes")}
    if any(part is not getattr(plan, name) for name, part in parts.items()):
        plan = replace(plan, **parts)
    return replace(
        problem,
        query=problem.query.detach(),
        key=problem.key.detach(),
        value=problem.value.detach(),
        sink_logits=dense(problem.sink_logits),
        key_weights=dense(problem.key_weights),
        block_mask=dense(problem.block_mask),
        plan=plan,
    )


def supports_gradients(problem: Problem) -> str | None:
    """None when `gradients` can do all of the backward pass of `problem`, else why not."""
    if problem.groups is not None:
        return "key groups have no gradient there"
    if problem.differentiable:
        names = ", ".join(sorted(problem.differentiable))
        return f"no gradient flows through {names} there"
    if problem.plan.bias is not None and problem.plan.bias.requires_grad:
        return "it makes no gradient for a bias"
    if problem.wants("block_influence"):
        return "it does not make block_influence"
    return None


@torch.no_grad()
def gradients(saved: Saved, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and learned sinks, and block sums of them."""
    from lens_kernels.triton_gradients import run_gradients

    with _device(saved.problem):
        return run_gradients(saved, upstream)


def _device(problem: Problem) -> Any:
    """Triton launches on the current device."""
    device: Tensor = problem.query
    return torch.cuda.device_of(device)
