"""Packs a `Problem` into the arguments of the Triton kernels: tuples, tiles, ranges of tiles.

Imported late (triton_logits says why).
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lens_kernels.problem import Problem
from lens_kernels.triton_logits import Blocks, Kept, Mask, Plane, Rows, Scores, Shape

_LOG2E = math.log2(math.e)
_FAR = torch.iinfo(torch.int32).max
_poison = False
"""Tests set it: outputs start as NaN, so that what is not written shows."""


def new(problem: Problem, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for an output."""
    tensor = torch.empty(sizes, dtype=dtype, device=problem.device)
    return tensor.fill_(math.nan) if _poison else tensor


@dataclass(frozen=True)
class Config:
    """Lanes of a tile along queries and keys, warps of a program, stages of its pipeline.

    `precision` is that of the products of float32 inputs: three products on tensor cores, or
    "ieee", without them, where those would need more registers than there are.

    `registers` is what the compiler may give a thread. Left to itself it may spill a little so that
    more programs run at once.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    precision: str = "tf32x3"
    registers: int | None = None


def launch(kernel: Any, programs: int, config: Config, *arguments: Any, **constants: int) -> None:
    """Starts `kernel` on a grid of `programs`."""
    kernel[(programs,)](
        *arguments,
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
        maxnreg=config.registers,
    )


def power(number: int) -> int:
    """The smallest power of two not below it, at least 16: the shortest side of a matrix product."""
    return max(16, triton.next_power_of_2(number))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an H200 where there is no GPU (interpreter)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def shape(problem: Problem) -> Shape:
    return Shape(
        problem.heads,
        problem.heads // problem.kv_heads,
        problem.queries,
        problem.keys,
    )


def rows_of(tensor: Tensor) -> Rows:
    """`tensor` [batch, heads, positions, dim] as an argument; copied where dim is not dense."""
    dense = tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
    width = tensor.shape[-1]
    return Rows(dense, *dense.stride()[:3], tl.constexpr(power(width)), tl.constexpr(width))


def operands(problem: Problem) -> tuple[Rows, Rows, Rows]:
    """Query, key and value."""
    return rows_of(problem.query), rows_of(problem.key), rows_of(problem.value)


def descriptor(tensor: Tensor, lanes: int) -> TensorDescriptor | None:
    """What sm_90 loads tiles of `lanes` positions of [batch, heads, positions, dim] by, itself, without a pointer for each row.

    None on older GPUs, and where the numbers are not of 16 bits or lie where it cannot go: it wants rows, heads and batch
    rows to start at multiples of 16 bytes, and to be apart.
    """
    step, size = 8, tensor.shape
    strides = [
        step if one == 1 else stride for one, stride in zip(size, tensor.stride(), strict=True)
    ]
    fits = strides[-1] == 1 or size[-1] == 1
    fits = fits and tensor.data_ptr() % 16 == 0
    fits = fits and all(stride > 0 and stride % step == 0 for stride in strides[:-1])
    if capability(tensor.device) < (9, 0) or tensor.element_size() != 2 or not fits:
        return None
    box = [1, 1, lanes, power(size[-1])]
    return TensorDescriptor(tensor, list(size), [*strides[:-1], 1], box)


def _plane(problem: Problem, tensor: Tensor | None) -> Plane | None:
    if tensor is None:
        return None
    full = tensor.detach().expand(problem.batch, problem.heads, problem.queries, -1)
    return Plane(full.view(torch.uint8) if full.dtype == torch.bool else full, *full.stride())


def mask(problem: Problem) -> Mask:
    plan = problem.plan
    loaded = not plan.simple
    return Mask(
        plan.low if loaded else None,
        plan.high if loaded else None,
        plan.anchor if loaded else None,
        None if plan.keep is None else plan.keep.view(torch.uint8),
        _plane(problem, plan.allowed),
        _plane(problem, plan.bias),
        plan.slopes,
        plan.offset,
        plan.window,
        tl.constexpr(plan.causal),
    )


def scores(problem: Problem, config: Config) -> Scores:
    plain = problem.softcap is None and problem.plan.bias is None and problem.plan.slopes is None
    half = problem.query.dtype != torch.float32
    return Scores(
        problem.scale if problem.softcap is not None else problem.scale * _LOG2E,
        problem.softcap,
        tl.constexpr(plain and problem.scale > 0),
        tl.constexpr("ieee" if half else config.precision),
    )


def hiding(problem: Problem, config: Config) -> tuple[Mask, Scores, Kept | None]:
    """What makes P of the products, for the passes that know the LSE."""
    return mask(problem), scores(problem, config), kept(problem)


def straight(lanes: int) -> Blocks:
    """Tiles of consecutive positions."""
    return Blocks(*map(tl.constexpr, (lanes, lanes, 1, lanes)))


def of_blocks(size: int, lanes: int, length: int, single: bool = False) -> Blocks:
    """Tiles of at most `lanes` that respect blocks of `size`; `single`: of one piece each."""
    size = min(size, length)
    width = min(triton.next_power_of_2(size), lanes)
    if single:
        width = max(width, 16)
        lanes = width
    return Blocks(*map(tl.constexpr, (size, width, -(-size // width), lanes)))


def tiling(
    problem: Problem, config: Config, tall: str, blocked: bool
) -> tuple[Config, Blocks, Blocks]:
    """Tiles of rows and columns, no longer than the problem, and the config with warps to match.

    Args:
        tall: the axis along the rows of the matrix product, "rows" or "columns": four warps take 64
            lanes of it, and more would do their work twice.
        blocked: whether tiles must respect blocks; with a block mask, hold one piece each.
    """
    lanes = (
        min(config.rows, power(problem.queries)),
        min(config.columns, power(problem.keys)),
    )
    rows, columns = map(straight, lanes)
    if blocked:
        height, width = problem.block_size
        single = problem.block_mask is not None
        rows = of_blocks(height, lanes[0], problem.queries, single)
        columns = of_blocks(width, lanes[1], problem.keys, single)
    found, wanted = (rows, config.rows) if tall == "rows" else (columns, config.columns)
    warps = config.warps if found.lanes.value == wanted else min(config.warps, 4)
    real = replace(config, rows=rows.lanes.value, columns=columns.lanes.value, warps=warps)
    return real, rows, columns


def pieces(blocks: Blocks, length: int) -> int:
    """Number of pieces of an axis, those of a short last block included."""
    return -(-length // blocks.size.value) * blocks.parts.value


def tiles(blocks: Blocks, length: int) -> int:
    """Number of tiles of an axis."""
    return -(-pieces(blocks, length) // (blocks.lanes.value // blocks.width.value))


def kept(problem: Problem) -> Kept | None:
    if problem.block_mask is None:
        return None
    full = problem.block_mask.expand(problem.batch, problem.heads, -1, -1)
    return Kept(full.view(torch.uint8), *full.stride())


def _tile_numbers(blocks: Blocks, length: int, device: torch.device) -> Tensor:
    """The tile of each position, int64 [length]."""
    size, width, parts, lanes = (part.value for part in blocks)
    index = torch.arange(length, device=device)
    piece = index // size * parts + index % size // width
    return piece // (lanes // width)


def key_spans(problem: Problem, blocks: Blocks) -> Tensor:
    """First key that each query tile sees and one past its last: [batch, tiles, 2] int32.

    (far, 0) for a tile that sees none.
    """
    plan = problem.plan
    count = tiles(blocks, problem.queries)
    number = _tile_numbers(blocks, problem.queries, problem.device).expand(problem.batch, -1)
    empty = plan.high <= plan.low
    first = plan.low.new_full((problem.batch, count), _FAR)
    first = first.scatter_reduce(1, number, plan.low.masked_fill(empty, _FAR), "amin")
    last = plan.high.new_zeros((problem.batch, count))
    last = last.scatter_reduce(1, number, plan.high, "amax")
    return torch.stack((first, last), dim=-1)


def query_spans(problem: Problem, rows: Blocks, columns: Blocks) -> Tensor | None:
    """First query tile that sees a key of each key tile and one past the last: [batch, tiles, 2].

    None where the kernel computes it, for a simple mask.
    """
    if problem.plan.simple:
        return None
    spans = key_spans(problem, rows)[:, None]  # [batch, 1, query tiles, 2]
    number = _tile_numbers(columns, problem.keys, problem.device)
    index = torch.arange(problem.keys, dtype=torch.int32, device=problem.device)
    count = tiles(columns, problem.keys)
    first = index.new_full((count,), _FAR).scatter_reduce(0, number, index, "amin")
    last = index.new_zeros((count,)).scatter_reduce(0, number, index, "amax")
    meets = (spans[..., 0] <= last[:, None]) & (spans[..., 1] > first[:, None])
    return first_and_last(meets)


def first_and_last(flags: Tensor) -> Tensor:
    """Index of the first True along the last axis, and one past the last: [..., 2]; (0, 0): none."""
    steps = flags.to(torch.uint8)
    begin = steps.argmax(-1)
    end = steps.shape[-1] - steps.flip(-1).argmax(-1)
    return (torch.stack((begin, end), dim=-1) * flags.any(-1)[..., None]).to(torch.int32)


def pooled(pieces_map: Tensor, rows: Blocks, columns: Blocks, largest: bool = False) -> Tensor:
    """Blocks [lines, query_blocks, key_blocks] from the pieces of them."""
    if rows.parts.value == columns.parts.value == 1:
        return pieces_map
    parts = pieces_map.unflatten(2, (-1, columns.parts.value)).unflatten(1, (-1, rows.parts.value))
    axes: Sequence[int] = (2, 4)
    return parts.amax(axes) if largest else parts.sum(axes)
