"""Checks the arguments of `attention` once, before any work, and makes the `Problem`.

Every refusal says what was expected, what came and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_kernels.arguments import as_number, check_names, check_numbers, check_tensors
from lens_kernels.labels import read_groups, read_labels
from lens_kernels.masks import lower_mask
from lens_kernels.nonfinite import clean_padding
from lens_kernels.problem import Problem
from lens_kernels.statistics import resolve_statistics
from lens_kernels.types import AttentionMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**31 - 1
"""Of what counts positions: kernels hold them in 32 bits."""
LONG_BLOCK = 4096
"""A block beyond it is cut where the sequence ends, which changes no map."""
FURTHEST_CAP = 1e30
"""A softcap beyond it (below its inverse) caps as it does: logits in float32 show no difference."""
DIFFERENTIABLE = frozenset({"entropy", "block_mass", "received"})

if TYPE_CHECKING:
    from jaxtyping import Float

    from lens_kernels.labels import LabelPairs

    KeyWeights = Float[Tensor, "batch heads keys"] | Float[Tensor, "batch kv_heads keys"]


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    block_size: int | tuple[int, int] = 64,
    statistics: str | Iterable[str] = ("lse",),
    match: LabelPairs | None = None,
    prefix: int = 4,
    top_k: int = 8,
    grid: tuple[int, ...] | None = None,
    groups: Tensor | None = None,
    group_outputs: bool = True,
    block_mask: Tensor | None = None,
    key_weights: Tensor | None = None,
    differentiable: Iterable[str] = (),
) -> Problem:
    """The validated problem; arguments as in `attention`.

    Raises:
        TypeError, ValueError: one line with what was expected, what came and what to do.
    """
    _check_inputs(query, key, value)
    check_tensors(
        sink_logits=sink_logits, groups=groups, block_mask=block_mask, key_weights=key_weights
    )
    query, key, value = query.resolve_neg(), key.resolve_neg(), value.resolve_neg()
    batch, head_dim = query.shape[0], query.shape[3]
    keys = key.shape[2]
    blocks = _block_size(block_size, query.shape[2], keys)
    compute_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if mask is not None and not isinstance(mask, AttentionMask):
        raise TypeError(
            f"mask must be an AttentionMask, got {type(mask).__name__}; wrap a bool tensor as "
            "AttentionMask(allowed=...), an additive one as AttentionMask(bias=...)"
        )
    plan = lower_mask(mask or AttentionMask(), query, key)
    query_labels, key_labels = read_labels(match, query, key)
    group_ids, group_count = read_groups(groups, batch, keys, query.device)
    if not isinstance(group_outputs, bool):
        raise TypeError(f"group_outputs must be True or False, got {group_outputs!r}")
    weights = _key_weights(key_weights, query, key, compute_dtype)
    sinks = _sink_logits(sink_logits, query, compute_dtype)
    given = {
        "match": match,
        "key_weights": key_weights,
        "grid": grid,
        "gradients": True if _any_gradient(query, key, value, sinks, plan.bias) else None,
    }
    available = frozenset(name for name, value in given.items() if value is not None)
    names = resolve_statistics(statistics, available)
    if mask is not None:
        query, key, value, weights = clean_padding(mask, plan, query, key, value, weights)
    if weights is not None and not bool(weights.isfinite().all()):
        raise ValueError("key_weights must be finite, got NaN or an infinity at a key that is seen")
    return Problem(
        query=query,
        key=key,
        value=value,
        plan=plan,
        scale=_scale(scale, head_dim),
        softcap=_softcap(softcap, compute_dtype),
        sink_logits=sinks,
        block_size=blocks,
        statistics=names,
        query_labels=query_labels,
        key_labels=key_labels,
        prefix=min(_positive("prefix", prefix), keys),
        top_k=min(_positive("top_k", top_k), math.ceil(keys / blocks[1])),
        grid=_grid(grid, keys),
        groups=group_ids,
        group_count=group_count,
        group_outputs=group_outputs,
        block_mask=_block_mask(block_mask, query, keys, blocks),
        key_weights=weights,
        differentiable=_differentiable(differentiable, names),
    )


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": query, "key": key, "value": value}
    check_tensors(**named)
    check_numbers(**named)
    for name, tensor in named.items():
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be [batch, heads, positions, dim], got {list(tensor.shape)}; "
                "add the missing axes with unsqueeze"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} has an empty axis: {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name} must be one of {known}, got {tensor.dtype}")
    if query.is_meta:
        raise ValueError("query is on the meta device and holds no numbers; load it first")
    for name in ("key", "value"):
        if named[name].dtype != query.dtype:
            raise TypeError(
                f"{name} is {named[name].dtype}, the query {query.dtype}; convert one of them"
            )
        if named[name].device != query.device:
            raise ValueError(
                f"{name} is on {named[name].device}, the query on {query.device}; move it there"
            )
        if named[name].shape[0] != query.shape[0]:
            raise ValueError(
                f"{name} has batch {named[name].shape[0]}, the query {query.shape[0]}; they must "
                "be equal"
            )
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            "key and value must agree in kv_heads and keys, got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if key.shape[3] != query.shape[3]:
        raise ValueError(
            f"query and key must agree in head_dim, got {query.shape[3]} and {key.shape[3]}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"heads must be a multiple of kv_heads, got {query.shape[1]} and {key.shape[1]}"
        )


def _any_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _block_size(block_size: int | tuple[int, int], queries: int, keys: int) -> tuple[int, int]:
    if isinstance(block_size, tuple | list):
        if len(block_size) != 2:
            raise ValueError(
                f"block_size must be one integer or (query_block, key_block), got {block_size!r}"
            )
        return _block_side(block_size[0], queries), _block_side(block_size[1], keys)
    return _block_side(block_size, queries), _block_side(block_size, keys)


def _block_side(size: int, length: int) -> int:
    """The side; of one block for the whole sequence no more than backends can fill up to."""
    size = _positive("block_size", size)
    if size > LARGEST:
        raise ValueError(
            f"block_size must be at most {LARGEST}, got {size}; one of the length of the sequence "
            "makes a single block"
        )
    return min(size, max(length, LONG_BLOCK))


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not math.isfinite(number := as_number("scale", scale)):
        raise ValueError(f"scale must be finite, got {scale}; None means 1/sqrt(head_dim)")
    return number


def _softcap(softcap: float | None, dtype: torch.dtype) -> float | None:
    if softcap is None:
        return None
    number = as_number("softcap", softcap)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"softcap must be positive and finite, got {softcap}; None means no cap")
    return number if dtype == torch.float64 else min(max(number, 1 / FURTHEST_CAP), FURTHEST_CAP)


def _sink_logits(sinks: Tensor | None, query: Tensor, dtype: torch.dtype) -> Tensor | None:
    if sinks is None:
        return None
    heads = query.shape[1]
    if tuple(sinks.shape) != (heads,) or not sinks.is_floating_point():
        raise ValueError(
            f"sink_logits must be floating point, one per head ([{heads}]), got {sinks.dtype} "
            f"{list(sinks.shape)}"
        )
    if sinks.device != query.device:
        raise ValueError(
            f"sink_logits is on {sinks.device}, the query on {query.device}; move it there"
        )
    if not bool((sinks < math.inf).all()):
        raise ValueError(
            "sink_logits must hold no NaN and no +inf; -inf means no sink in that head"
        )
    return sinks.to(dtype).resolve_neg()


def _block_mask(
    block_mask: Tensor | None, query: Tensor, keys: int, blocks: tuple[int, int]
) -> Tensor | None:
    if block_mask is None:
        return None
    batch, heads, queries, _ = query.shape
    rows, columns = math.ceil(queries / blocks[0]), math.ceil(keys / blocks[1])
    if block_mask.dtype != torch.bool:
        raise TypeError(f"block_mask must be bool (True = computed), got {block_mask.dtype}")
    if block_mask.device != query.device:
        raise ValueError(
            f"block_mask is on {block_mask.device}, the query on {query.device}; move it there"
        )
    shape = tuple(block_mask.shape)
    if len(shape) != 4 or not (
        shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (rows, columns)
    ):
        raise ValueError(
            "block_mask must be [batch | 1, heads | 1, query_blocks, key_blocks] = "
            f"[{batch} | 1, {heads} | 1, {rows}, {columns}] with block_size {blocks}, got "
            f"{list(shape)}"
        )
    return block_mask.contiguous()


def _key_weights(
    weights: Tensor | None, query: Tensor, key: Tensor, dtype: torch.dtype
) -> Tensor | None:
    if weights is None:
        return None
    batch, heads = query.shape[:2]
    kv_heads, keys = key.shape[1:3]
    if not weights.is_floating_point():
        raise TypeError(f"key_weights must be floating point, got {weights.dtype}")
    if weights.device != query.device:
        raise ValueError(
            f"key_weights is on {weights.device}, the query on {query.device}; move it there"
        )
    if tuple(weights.shape) not in ((batch, heads, keys), (batch, kv_heads, keys)):
        raise ValueError(
            f"key_weights must be [batch, heads, keys] = [{batch}, {heads}, {keys}] or [batch, "
            f"kv_heads, keys] = [{batch}, {kv_heads}, {keys}], got {list(weights.shape)}"
        )
    if weights.shape[1] != heads:
        weights = weights.repeat_interleave(heads // kv_heads, dim=1)
    return weights.detach().to(dtype).resolve_neg().contiguous()


def _grid(grid: tuple[int, ...] | None, keys: int) -> tuple[int, int, int] | None:
    if grid is None:
        return None
    if not isinstance(grid, tuple | list):
        raise TypeError(f"grid must be (height, width), got {type(grid).__name__}")
    if len(grid) not in (2, 3):
        raise ValueError(f"grid must be (height, width) or (height, width, first key), got {grid}")
    height, width = _positive("grid height", grid[0]), _positive("grid width", grid[1])
    first = grid[2] if len(grid) == 3 else 0
    if first < 0 or first + height * width > keys:
        raise ValueError(
            f"grid {height}x{width} from key {first} needs {first + height * width} keys, got "
            f"{keys}; give the first image key as the third entry"
        )
    return height, width, first


def _differentiable(names: Iterable[str], statistics: frozenset[str]) -> frozenset[str]:
    asked = check_names("differentiable", names)
    if not asked <= DIFFERENTIABLE:
        raise ValueError(
            f"differentiable may hold {', '.join(sorted(DIFFERENTIABLE))} (output and lse always "
            f"are), got {', '.join(sorted(asked - DIFFERENTIABLE))}"
        )
    if not asked <= statistics:
        raise ValueError(
            f"differentiable names {', '.join(sorted(asked - statistics))}, which statistics= does "
            "not ask for; add it there"
        )
    return asked
