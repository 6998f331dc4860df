"""Tile sizes, warps and pipeline stages of each kernel, by input type and head dim: one table each.

Chosen so that nothing spills and shared memory fits (227 KB on sm_90, 163 KB on sm_80), which
tests/kernels/test_triton_compile.py holds them to without a GPU. No autotuning: it needs a GPU, and
makes results depend on what was timed.
"""

from __future__ import annotations

import torch

from lens_kernels.problem import Problem
from lens_kernels.triton_launch import Config, capability, power

_SUMS = ("entropy", "concentration", "distance", "prefix_mass")
_MANY = ("match_mass", "moments", "grid_moments", "mean_value_norm")


def _width(problem: Problem) -> int:
    return max(64, power(problem.head_dim), power(problem.value_dim))


def _hopper(problem: Problem) -> bool:
    return capability(problem.device) >= (9, 0)


def _plain(problem: Problem, window: bool = False) -> bool:
    """Whether nothing but causality, ranges, learned sinks (and a window) bears on the logits."""
    plan = problem.plan
    extras = (plan.keep, plan.allowed, plan.bias, plan.slopes, problem.softcap)
    return all(part is None for part in extras) and (window or plan.window is None)


def heavy_rows(problem: Problem) -> bool:
    """Whether the forward pass needs more registers than a second loop, without masks, leaves."""
    if _width(problem) == 256:
        return not _plain(problem) or problem.wants(*_SUMS, *_MANY)
    return not _plain(problem, window=True) or problem.wants(*_MANY)


def row_config(problem: Problem) -> Config:
    """Of the forward pass."""
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Config(64, 32, 4 if width < 256 else 8, 2)
    if heavy_rows(problem):
        return Config(128, 32, 8, 3) if width < 256 else Config(64, 32, 8, 2)
    few = width == 64 or (_plain(problem) and not problem.wants(*_SUMS))
    return Config(128, 64, 8, 3 if few and width < 256 else 2)


def columns_config(problem: Problem) -> Config:
    """Of the pass along columns."""
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Config(32, 64, 4 if width < 256 else 8, 2)
    return {64: Config(64, 128, 8, 3), 128: Config(64, 128, 8, 3), 256: Config(64, 128, 8, 2)}[
        width
    ]


def diagonals_config(problem: Problem) -> Config:
    """Of the pass along diagonals: square tiles."""
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Config(64, 64, 8, 2)
    return {64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(64, 64, 4, 2)}[
        width
    ]


def narrow(problem: Problem) -> bool:
    """Whether the accumulators of `key_gradients` leave no registers for two loops."""
    return _width(problem) > 128


def key_gradients_together(problem: Problem) -> bool:
    """Whether gradients of keys and values are made in one launch, where registers are enough.

    In two launches the logits are made twice, about a fifth of the backward pass.
    """
    return _width(problem) <= 128 and _plain(problem) and problem.query.dtype != torch.float32


def backward_config(problem: Problem, of: str) -> Config:
    """Of the gradients of keys and values in one ("both") or in two launches ("key"), or "query"."""
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Config(32, 32, 4, 1)
    if of == "both":
        return {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2)}[width]
    if of == "key":
        return Config(32 if width < 256 or _plain(problem) else 16, 128, 8, 2)
    return Config(128, 64 if width < 256 else 32, 8, 2)
