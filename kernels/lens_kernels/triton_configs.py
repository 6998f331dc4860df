"""Tile sizes, warps and pipeline stages of each kernel, by input type and head dim: one table each.

Chosen by compiling, for few instructions a key: the matrix products of sm_90 (wgmma) run without a
wait for each, nothing spills but at most 64 bytes a thread where a larger tile saves more than that
costs, and shared memory fits (227 KB, 163 KB on sm_80). float32 takes small tiles: its products are three for one.
tests/kernels/test_triton_compile.py holds the tiles to that without a GPU, and
tests/benchmarks/COMPILED.md lists what each kernel uses. No autotuning: it needs a GPU, and makes
results depend on what was timed.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lens_kernels.problem import Problem
from lens_kernels.triton_launch import Config, capability, power

_SUMS = ("entropy", "concentration", "distance", "prefix_mass")
_MANY = ("match_mass", "moments", "grid_moments", "mean_value_norm")

_SHORT = 64
"""Keys of a prefix that are multiplied a second time: four narrow tiles at most."""
_MOST = 255
"""Registers that a thread can have."""
_SMALL = Config(32, 32, 8, 2)
"""Where nothing larger leaves enough registers."""
_EXACT = Config(32, 32, 8, 1, "ieee")
"""Of float32 products that are too wide for tensor cores."""

_ROWS = {
    64: (
        Config(128, 64, 8, 3),
        Config(128, 64, 8, 3),
        Config(128, 32, 8, 3),
        Config(128, 16, 8, 2),
        Config(64, 32, 8, 2),
        _SMALL,
        Config(32, 16, 8, 2),
    ),
    128: (
        Config(128, 64, 8, 3),
        Config(128, 64, 8, 3, registers=_MOST),
        Config(128, 32, 8, 3),
        Config(128, 16, 8, 2, registers=_MOST),
        Config(64, 32, 8, 2, registers=_MOST),
        _SMALL,
        Config(32, 16, 8, 2),
    ),
    256: (
        Config(128, 32, 8, 2),
        Config(64, 32, 8, 2),
        Config(64, 32, 8, 2),
        _SMALL,
        *(Config(32, 16, 8, 2),) * 2,
        Config(16, 16, 4, 2),
    ),
}
"""Tiles of the forward pass by width and by how much it keeps in registers, least first."""

_FULL_ROWS = {
    64: (
        Config(64, 32, 4, 2),
        Config(64, 32, 4, 2),
        Config(32, 32, 4, 2),
        Config(32, 32, 8, 1),
        Config(16, 32, 4, 1),
        Config(16, 16, 4, 1),
    ),
    128: (*(Config(16, 32, 4, 1),) * 5, Config(16, 16, 4, 1)),
    256: (
        _EXACT,
        Config(32, 16, 8, 1, "ieee"),
        Config(16, 16, 8, 1, "ieee", _MOST),
    ),
}
"""The same for float32 inputs: products of three tf32 parts, and twice the memory."""


def _width(problem: Problem) -> int:
    return max(64, power(problem.head_dim), power(problem.value_dim))


def _full(problem: Problem) -> bool:
    return problem.query.dtype == torch.float32


def _hopper(problem: Problem) -> bool:
    return capability(problem.device) >= (9, 0)


def _extras(problem: Problem) -> int:
    """What bears on the logits beside a range of keys."""
    plan = problem.plan
    extras = (plan.keep, plan.allowed, plan.bias, plan.slopes, problem.softcap, problem.block_mask)
    return sum(part is not None for part in extras)


def plain(problem: Problem) -> bool:
    """Whether nothing but causality and learned sinks bears on the logits.

    Then tiles that all rows see wholly get a loop of their own, without a mask. Otherwise one loop
    masks every tile: two would not leave enough registers, and masking is little of the work.
    """
    return not _extras(problem) and problem.plan.window is None and problem.plan.simple


def _weight(problem: Problem) -> int:
    """How many registers the mask takes: 0 (plain), 1 (a range of keys), 2 (more), 3 (much more)."""
    extras = _extras(problem)
    return 0 if plain(problem) else 1 if not extras else 2 if extras <= 2 else 3


def _open(problem: Problem) -> bool:
    """Whether every query sees every key: wide heads then need a few registers more."""
    return plain(problem) and not problem.plan.causal


def _odd(problem: Problem) -> bool:
    """Whether it is plain and causal, with a length that 16 does not divide: loads then need more."""
    uneven = problem.query.shape[-2] % 16 or problem.key.shape[-2] % 16
    return bool(uneven) and plain(problem) and problem.plan.causal


_WIDEST = Config(128, 128, 8, 2)
"""Of the LSE alone: half the turns of the loop, and of its maxima across lanes."""
_RICH = Config(128, 64, 8, 2)
"""Of every statistic: it spills up to 48 bytes, and takes half the instructions of 128 x 16."""


def row_config(problem: Problem) -> Config:
    """Of the forward pass, by what it keeps in registers."""
    weight, width = _weight(problem), _width(problem)
    full, many, hopper = _full(problem), problem.wants(*_MANY), _hopper(problem)
    if hopper and not full and width < 256:
        if many and weight < 2:
            return _RICH
        crowded = width == 128 and (_open(problem) or problem.groups is not None)
        if not weight and not many and not problem.wants(*_SUMS) and not crowded:
            return _WIDEST
    level = weight + (2 if many else int(problem.wants(*_SUMS)))
    # where the compiler needs more than the sum, found by compiling
    if many and (weight > 1 or (weight and hopper and full and width == 128)):
        level = 5
    elif hopper:
        level += many and (not weight or width == 256)
        level += width == 256 and (many or full) and _odd(problem)
    elif full:
        level += 2
    elif not many or width == 256:
        level += level > 0 or width == 256
        level += width == 256 and (_open(problem) or _odd(problem))
    ladder = (_FULL_ROWS if full else _ROWS)[width]
    config = ladder[min(level, len(ladder) - 1)]
    if problem.plan.keep is not None and width == 256 and not hopper and not full:
        config = replace(config, registers=_MOST)
    return replace(config, registers=None) if many and not full else config


def short_prefix(problem: Problem) -> bool:
    """Whether `prefix_mass` is few tiles more, and its keys are the first ones of every row."""
    simple = problem.plan.simple and problem.block_mask is None
    return problem.wants("prefix_mass") and simple and problem.prefix <= _SHORT


def one_pass(problem: Problem) -> bool:
    """Whether registers are enough for a lone key beside the others in one pass."""
    return not _full(problem) and _width(problem) <= 128


def split_rows(problem: Problem) -> bool:
    """Whether the forward pass has a loop without masks."""
    return plain(problem) and not problem.wants(*_MANY)


def columns_config(problem: Problem) -> Config:
    """Of the pass along columns."""
    width = _width(problem)
    if _full(problem):
        return {64: Config(32, 64, 4, 2), 128: Config(16, 32, 4, 1), 256: _EXACT}[width]
    if _weight(problem) > 2 and width == 256 and not _hopper(problem):
        return Config(32, 64, 8, 2)
    if _weight(problem) > 1:
        tight = width == 64 and _loaded(problem) and not _hopper(problem)
        return Config(64, 64, 8, 2, registers=_MOST if tight else None)
    if width == 256 and _open(problem) and not _hopper(problem):
        return Config(64, 64, 8, 2, registers=_MOST)
    if width < 256:
        return Config(64, 128, 8, 3)
    return Config(64, 128, 8, 2, registers=_MOST if plain(problem) else None)


def diagonals_config(problem: Problem) -> Config:
    """Of the pass along diagonals: square tiles."""
    width = _width(problem)
    if _full(problem):
        return Config(32, 32, 4, 1) if width == 64 else _EXACT
    bare = _weight(problem) < 2
    if width == 256:
        return Config(64, 64, 4, 2) if bare else _SMALL
    if not bare:
        return Config(64, 64, 8, 2)
    return Config(128, 128, 8, 3 if width == 64 else 2)


def key_gradients_together(problem: Problem) -> bool:
    """Whether gradients of keys and values are made in one launch, where registers are enough.

    In two launches the logits are made twice, about a fifth of the backward pass.
    """
    return _width(problem) <= 128 and plain(problem) and not _full(problem)


def split_key_gradients(problem: Problem) -> bool:
    """Whether `key_gradients` has a loop without masks."""
    return split_query_gradients(problem) and _width(problem) <= 128


def split_query_gradients(problem: Problem) -> bool:
    """Whether `query_gradients` has a loop without masks."""
    return plain(problem) and not _full(problem)


def backward_config(problem: Problem, of: str) -> Config:
    """Of the gradients of keys and values in one launch ("both") or in two, or of queries.

    Args:
        of: "both", "key", "value" or "query".
    """
    width, weight, hopper = _width(problem), _weight(problem), _hopper(problem)
    if _full(problem):
        return _full_backward(problem, of)
    if problem.block_mask is not None and width > 64:  # the block holds the tile down
        if width == 256:
            return Config(32, 16, 8, 2) if of == "query" else Config(16, 32, 8, 2)
        if of == "query" and not hopper:
            return Config(64, 32, 8, 2)
    if of == "both":
        rows = {64: 64, 128: 32}[width]
        return Config(rows if hopper else rows // 2, 128, 8, 2)
    if of != "query":
        if width == 256:
            wide = Config(16, 128 if hopper else 64, 8, 2)
            return replace(_SMALL, registers=_MOST) if hopper and weight > 1 else wide
        if not hopper:
            return Config(16, 128, 8, 2) if weight < 2 else Config(16, 64, 8, 2, registers=_MOST)
        return Config(32 if weight < 2 else 16, 128, 8, 2)
    if width == 256:
        small = _SMALL if hopper else replace(_SMALL, registers=_MOST)
        if weight < 2:
            return Config(128, 16, 8, 2) if hopper else Config(64, 32, 8, 2)
        return small
    if weight > 2:  # with 64 rows the compiler serialises the products
        return _SMALL
    if not hopper and width == 128 and problem.plan.allowed is not None:
        return Config(64, 32, 8, 2)
    wide = hopper and (width == 64 or weight < 2)
    return Config(128, 64, 8, 2, registers=_MOST) if wide else Config(128, 32, 8, 2)


def _loaded(problem: Problem) -> bool:
    """Whether a mask or a bias is loaded, entry by entry."""
    plan = problem.plan
    return any(part is not None for part in (plan.keep, plan.allowed, plan.bias))


def _full_backward(problem: Problem, of: str) -> Config:
    width, weight, sparse = _width(problem), _weight(problem), problem.block_mask is not None
    if of == "query":
        if width == 64 or (width == 128 and not _loaded(problem)):
            return Config(16, 16 if width == 128 and weight > 1 else 32, 4, 1)
        if width == 256 and sparse:
            return Config(16, 16, 4, 1, "ieee")
        columns = 16 if width == 256 and weight > 1 else 32
        return Config(16, columns, 8, 1, "ieee", _MOST)
    if width == 256:
        return Config(16, 32 if of == "value" and sparse else 16, 8, 1, "ieee")
    if width == 128:
        if _loaded(problem):
            return Config(16, 32, 8, 1, "ieee", _MOST)
        return Config(16, 16, 4 if sparse or problem.softcap is not None else 8, 1)
    if max(problem.head_dim, problem.value_dim) <= 32:
        return Config(32, 32, 4, 1)
    few = weight or _odd(problem)
    return Config(16, 16, 4, 1, registers=_MOST) if few else Config(16, 32, 4, 1)
