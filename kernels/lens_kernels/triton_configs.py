"""Tile sizes, warps and pipeline stages of each kernel, by input type and head dim: one table each.

Chosen so that nothing spills and shared memory fits (227 KB on sm_90, 163 KB on sm_80), which
tests/kernels/test_triton_compile.py holds them to without a GPU. No autotuning: it needs a GPU, and
makes results depend on what was timed.
"""

from __future__ import annotations

import torch

from lens_kernels.problem import Problem
from lens_kernels.triton_launch import Config, capability, power


def _width(problem: Problem) -> int:
    return max(64, power(problem.head_dim), power(problem.value_dim))


def _hopper(problem: Problem) -> bool:
    return capability(problem.device) >= (9, 0)


def row_config(problem: Problem) -> Config:
    """Of the forward pass."""
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Config(64, 32, 4 if width < 256 else 8, 2)
    return {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 64, 8, 2)}[
        width
    ]


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


def key_gradients_together(problem: Problem) -> bool:
    """Whether gradients of keys and values are made in one launch, where registers are enough.

    In two launches the logits are made twice, about a fifth of the backward pass.
    """
    plan = problem.plan
    extras = (plan.window, plan.keep, plan.allowed, plan.bias, plan.slopes, problem.softcap)
    plain = all(part is None for part in extras)
    return _width(problem) <= 128 and plain and problem.query.dtype != torch.float32


def backward_config(problem: Problem, of: str) -> Config:
    """Of the gradients of keys and values in one ("both") or in two launches ("key"), or "query"."""
    width = _width(problem)
    if problem.query.dtype == torch.float32:
        return Config(32, 32, 4, 1)
    if of == "both":
        return {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2)}[width]
    if of == "key":
        return {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2), 256: Config(32, 64, 4, 1)}[
            width
        ]
    return {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 16, 4, 1)}[width]
