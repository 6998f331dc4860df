"""Tile sizes, warps and pipeline stages of each kernel, by input type and head dim: one table each.

Chosen so that nothing spills on sm_90 and shared memory fits (227 KB, 163 KB on sm_80), which
tests/kernels/test_triton_compile.py holds them to without a GPU. No autotuning: it needs a GPU, and
makes results depend on what was timed.
"""

from __future__ import annotations

import torch

from lens_kernels.problem import Problem
from lens_kernels.triton_launch import Config, capability, power

_SUMS = ("entropy", "concentration", "distance", "prefix_mass")
_MANY = ("match_mass", "moments", "grid_moments", "mean_value_norm")


_SMALL = Config(32, 32, 8, 2)
"""Where nothing larger leaves enough registers."""


def _width(problem: Problem) -> int:
    return max(64, power(problem.head_dim), power(problem.value_dim))


def _full(problem: Problem) -> bool:
    """float32 inputs: products of three tf32 parts, and twice the memory."""
    return problem.query.dtype == torch.float32


def _hopper(problem: Problem) -> bool:
    return capability(problem.device) >= (9, 0)


def _bare(problem: Problem) -> bool:
    """Whether the logits are products and the mask is a range of keys."""
    plan = problem.plan
    extras = (plan.keep, plan.allowed, plan.bias, plan.slopes, problem.softcap, problem.block_mask)
    return all(part is None for part in extras)


def plain(problem: Problem) -> bool:
    """Whether nothing but causality and learned sinks bears on the logits.

    Then tiles that all rows see wholly get a loop of their own, without a mask. Otherwise one loop
    masks every tile: two would not leave enough registers, and masking is little of the work.
    """
    return _bare(problem) and problem.plan.window is None and problem.plan.simple


def row_config(problem: Problem) -> Config:
    """Of the forward pass, by what it keeps in registers."""
    width = _width(problem)
    if _full(problem):
        return Config(64, 32, 4 if width < 256 else 8, 2)
    level = 2 if problem.wants(*_MANY) else int(problem.wants(*_SUMS))
    level += not plain(problem)
    return {
        64: (
            Config(128, 64, 8, 3),
            Config(128, 64, 8, 3),
            Config(128, 32, 8, 3),
            Config(128, 16, 8, 2),
        ),
        128: (
            Config(128, 64, 8, 3),
            Config(128, 64, 8, 2),
            Config(128, 32, 8, 3),
            Config(128, 16, 8, 2),
        ),
        256: (
            Config(128, 32, 8, 2),
            Config(64, 32, 8, 2),
            Config(64, 32, 8, 2) if not problem.wants(*_MANY) else _SMALL,
            _SMALL,
        ),
    }[width][level]


def split_rows(problem: Problem) -> bool:
    """Whether the forward pass has a loop without masks."""
    return plain(problem) and not problem.wants(*_MANY)


def columns_config(problem: Problem) -> Config:
    """Of the pass along columns."""
    width = _width(problem)
    if _full(problem):
        return Config(32, 64, 4 if width < 256 else 8, 2)
    return Config(64, 128, 8, 3 if width < 256 else 2)


def diagonals_config(problem: Problem) -> Config:
    """Of the pass along diagonals: square tiles."""
    width = _width(problem)
    if _full(problem):
        return Config(64, 64, 8, 2)
    if width == 256:
        return Config(64, 64, 4, 2) if _bare(problem) else _SMALL
    if not _bare(problem):
        return Config(64, 64, 4, 2)
    return Config(128, 128, 8, 3 if width == 64 else 2)


def key_gradients_together(problem: Problem) -> bool:
    """Whether gradients of keys and values are made in one launch, where registers are enough.

    In two launches the logits are made twice, about a fifth of the backward pass.
    """
    return _width(problem) <= 128 and plain(problem) and not _full(problem)


def split_key_gradients(problem: Problem) -> bool:
    """Whether `key_gradients` has a loop without masks."""
    return plain(problem) and _width(problem) <= 128


def backward_config(problem: Problem, of: str) -> Config:
    """Of the gradients of keys and values in one ("both") or in two launches ("key"), or "query"."""
    width = _width(problem)
    if _full(problem):
        return Config(32, 32, 4, 1)
    if of == "both":
        return {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2)}[width]
    if width == 256 and not _bare(problem):
        return _SMALL
    if of == "key":
        return Config(32 if width < 256 and _bare(problem) else 16, 128, 8, 2)
    wide = width == 64 or (width == 128 and _bare(problem))
    return Config(128, 64 if wide else 32, 8, 2) if width < 256 else Config(64, 32, 8, 2)
