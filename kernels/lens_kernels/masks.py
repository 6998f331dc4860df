"""Lowers an `AttentionMask` to the one form that backends read: an interval of keys per query row.

With anchor `a`, origin `o`, end `e`, window `w`, prefix `p` and the end `b` of the row's block, row by row:

    low  = max(o, a - w + 1)
    high = min(e, max(a + 1, min(max(o + p, b), a + w)))     causal
    high = min(e, a + w)                                     not causal

where terms of parts that were not given drop out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lens_kernels.problem import MaskPlan
from lens_kernels.types import AttentionMask


def lower_mask(mask: AttentionMask, query: Tensor, key: Tensor) -> MaskPlan:
    """The plan of `mask` for query [batch, heads, queries, _] and key [batch, kv_heads, keys, _].

    Raises:
        TypeError, ValueError: when a part of the mask does not fit, naming it.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    device = query.device
    window = _window(mask.window, queries + keys)
    ragged = (mask.key_lengths, mask.query_lengths, mask.key_start, mask.cu_seqlens)
    ragged = (*ragged, mask.prefix, mask.blocks)
    if all(part is None for part in ragged):
        plan = _simple(batch, queries, keys, mask.causal, window, device)
    else:
        plan = replace(_lowered(mask, batch, queries, keys, window, device), simple=False)
    shape = (batch, heads, queries, keys)
    extras = {
        "keep": _key_padding(mask.key_padding, batch, keys, device),
        "allowed": _allowed(mask.allowed, shape, device),
        "bias": _bias(mask.bias, shape, query),
        "slopes": _slopes(mask.alibi_slopes, query),
    }
    if all(part is None for part in extras.values()):
        return plan
    return replace(plan, **extras)


@lru_cache(maxsize=4)  # at 131,072 tokens one is 2 MB
def _simple(
    batch: int, queries: int, keys: int, causal: bool, window: int | None, device: torch.device
) -> MaskPlan:
    """The plan of causality and a window: the same at every layer of a model, and read alone."""
    with torch.inference_mode(False):
        mask = AttentionMask(causal=causal)
        return _lowered(mask, batch, queries, keys, window, device)


def _lowered(
    mask: AttentionMask,
    batch: int,
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
) -> MaskPlan:
    """The ranges of keys alone, as if the mask were simple."""
    row = torch.arange(queries, dtype=torch.int32, device=device).expand(batch, -1)
    column = torch.arange(keys, dtype=torch.int32, device=device).expand(batch, -1)
    origin, end, anchor, key_position, live = _sequences(mask, row, column)
    low, high = origin, end
    if mask.causal:
        reach = anchor + 1
        ahead = []
        if mask.prefix is not None:
            ahead.append(origin + _prefix(mask.prefix, batch, keys, device))
        if mask.blocks is not None:
            ahead.append(_block_ends(mask.blocks, anchor, keys))
        for bidirectional in ahead:
            if window is not None:
                bidirectional = torch.minimum(bidirectional, anchor + window)
            reach = torch.maximum(reach, bidirectional)
        high = torch.minimum(high, reach)
    elif mask.blocks is not None:
        raise ValueError(
            "blocks= lets a query see its own block whole in spite of causal=True, but causal is False and every key is "
            "visible already; set causal=True or leave blocks out"
        )
    elif mask.prefix is not None:
        raise ValueError(
            "prefix= lets the first keys be seen in spite of causal=True, but causal is False and "
            "every key is visible already; set causal=True or leave prefix out"
        )
    if window is not None:
        low = torch.maximum(low, anchor - window + 1)
        if not mask.causal:
            high = torch.minimum(high, anchor + window)
    seen = (high > low) & live
    zero = torch.zeros((), dtype=torch.int32, device=device)
    return MaskPlan(
        low=torch.where(seen, low, zero).contiguous(),
        high=torch.where(seen, high, zero).contiguous(),
        anchor=anchor.contiguous(),
        key_position=key_position.contiguous(),
        causal=mask.causal and mask.prefix is None and mask.blocks is None,
        simple=True,
        window=window,
        offset=keys - queries,
    )


def _sequences(
    mask: AttentionMask, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per query its sequence's origin, end and its anchor; per key its position; rows that live."""
    batch, queries = row.shape
    keys, device = column.shape[1], row.device
    if mask.cu_seqlens is not None:
        given = (mask.key_lengths, mask.query_lengths, mask.key_start)
        if any(part is not None for part in given):
            raise ValueError(
                "cu_seqlens says where sequences start and end: leave out key_lengths, "
                "query_lengths and key_start"
            )
        if queries != keys:
            raise ValueError(
                f"cu_seqlens needs queries and keys at the same positions, got {queries} queries "
                f"and {keys} keys"
            )
        bounds = _bounds("cu_seqlens", mask.cu_seqlens, batch, queries, device)
        segment = torch.searchsorted(bounds, row.contiguous(), right=True)
        start = bounds.gather(1, segment - 1)
        inside = segment < bounds.shape[1]
        end = bounds.gather(1, segment.clamp(max=bounds.shape[1] - 1))
        return start, end, row, row - start, inside

    key_end = _row_integers("key_lengths", mask.key_lengths, batch, keys, device, default=keys)
    query_end = _row_integers(
        "query_lengths", mask.query_lengths, batch, queries, device, default=queries
    )
    origin = _row_integers("key_start", mask.key_start, batch, keys, device, default=0)
    if mask.key_lengths is not None and mask.query_lengths is not None:
        anchor = row + (key_end - query_end)
    else:
        anchor = row + (keys - queries)
    shape = (batch, queries)
    return origin.expand(shape), key_end.expand(shape), anchor, column - origin, row < query_end


def _window(window: int | None, longest: int) -> int | None:
    """The window, at most twice `longest`: no distance is larger, and 32 bits hold the sums."""
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, Integral):
        raise TypeError(f"window must be an integer or None, got {window!r}")
    if window < 1:
        raise ValueError(
            f"window must be at least 1 (a query's own key), got {window}; use None for no window"
        )
    return min(int(window), 2 * longest)


def _integers(
    name: str,
    values: int | Tensor | Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dims: tuple[int, ...],
) -> Tensor:
    if isinstance(values, Tensor) and values.device != device:
        raise ValueError(f"{name} is on {values.device}, the query on {device}; move it there")
    try:
        tensor = torch.as_tensor(values, device=device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold integers of 64 bits: {error}") from None
    kinds = (tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool)
    if any(kinds) and (tensor.numel() or isinstance(values, Tensor)):  # an empty list has no type
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    tensor = tensor.to(torch.int64)
    if tensor.dim() not in dims:
        expected = " or ".join(f"{dim}-dimensional" for dim in dims)
        raise ValueError(f"{name} must be {expected}, got shape {list(tensor.shape)}")
    return tensor


def _row_integers(
    name: str,
    values: Tensor | Sequence[int] | None,
    batch: int,
    limit: int,
    device: torch.device,
    default: int,
) -> Tensor:
    """[batch, 1] integers in 0..limit, or the default."""
    if values is None:
        return torch.full((batch, 1), default, dtype=torch.int32, device=device)
    tensor = _integers(name, values, device, (1,))
    if tensor.shape[0] != batch:
        raise ValueError(f"{name} must have one entry per batch row ({batch}), got {len(tensor)}")
    if bool(((tensor < 0) | (tensor > limit)).any()):
        raise ValueError(f"{name} must lie in 0..{limit}, got {tensor.tolist()}")
    return tensor[:, None].to(torch.int32)


def _prefix(
    prefix: int | Tensor | Sequence[int], batch: int, keys: int, device: torch.device
) -> Tensor:
    """[1 | batch, 1], at most all keys."""
    given = min(prefix, keys) if isinstance(prefix, int) else prefix
    tensor = _integers("mask prefix", given, device, (0, 1))
    if tensor.dim() == 1 and tensor.shape[0] != batch:
        raise ValueError(
            f"mask prefix must be one integer or one per batch row ({batch}), got {len(tensor)}"
        )
    if bool((tensor < 0).any()):
        raise ValueError(f"mask prefix must be 0 or more, got {tensor.tolist()}")
    return tensor.clamp(max=keys).reshape(-1, 1).to(torch.int32)


def _block_ends(blocks: Any, anchor: Tensor, keys: int) -> Tensor:
    """[batch, queries]: one past the last key of the block in which each query stands; 0 where it is in none."""
    bounds = _bounds("blocks", blocks, len(anchor), keys, anchor.device)
    block = torch.searchsorted(bounds, anchor.contiguous(), right=True)
    ends = bounds.gather(1, block.clamp(max=bounds.shape[1] - 1))
    return torch.where((block > 0) & (block < bounds.shape[1]), ends, 0)


def _bounds(name: str, values: Any, batch: int, limit: int, device: torch.device) -> Tensor:
    """[batch, segments + 1] checked cumulative lengths."""
    bounds = _integers(name, values, device, (1, 2))
    if bounds.dim() == 2 and bounds.shape[0] != batch:
        raise ValueError(
            f"{name} must be [segments + 1] or [batch, segments + 1] with batch {batch}, got shape {list(bounds.shape)}"
        )
    bounds = bounds.expand(batch, -1).contiguous()
    if bounds.shape[1] < 2:
        raise ValueError(f"{name} needs at least two entries: 0 and the end of the first one")
    rises = bool((bounds.diff(dim=1) >= 0).all())
    if not rises or bool((bounds[:, 0] != 0).any()) or bool((bounds[:, -1] > limit).any()):
        of = "queries" if name == "cu_seqlens" else "keys"
        raise ValueError(
            f"{name} must rise from 0 to at most {limit} (the number of {of}), got {bounds.tolist()}"
        )
    return bounds.to(torch.int32)


def _key_padding(
    padding: Tensor | None, batch: int, keys: int, device: torch.device
) -> Tensor | None:
    if padding is None:
        return None
    _check_bool("key_padding", padding, device)
    if tuple(padding.shape) != (batch, keys):
        raise ValueError(
            f"key_padding must be [batch, keys] = [{batch}, {keys}], got {list(padding.shape)}"
        )
    return padding.contiguous()


def _check_bool(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"{name} must be bool (True = visible), got {tensor.dtype}; "
            "an additive mask goes into bias="
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the query on {device}; move it there")


def _four_axes(name: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """`tensor` with four axes, the last one whole, each other one whole or 1."""
    if tensor.dim() > 4:
        raise ValueError(f"{name} must have at most 4 axes, got shape {list(tensor.shape)}")
    full = tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))
    if any(size not in (1, want) for size, want in zip(full.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must be broadcastable to [batch, heads, queries, keys] = {list(shape)}, got "
            f"{list(tensor.shape)}"
        )
    return full.expand(-1, -1, -1, shape[3])


def _allowed(
    allowed: Tensor | None, shape: tuple[int, int, int, int], device: torch.device
) -> Tensor | None:
    if allowed is None:
        return None
    _check_bool("allowed", allowed, device)
    return _four_axes("allowed", allowed, shape)


def _bias(bias: Tensor | None, shape: tuple[int, int, int, int], query: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if not bias.is_floating_point():
        raise TypeError(
            f"bias must be a floating-point tensor, got {bias.dtype}; a bool mask goes into "
            "allowed= (True = visible)"
        )
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device}, the query on {query.device}; move it there")
    return _four_axes("bias", bias.resolve_neg(), shape)


def _slopes(slopes: Tensor | None, query: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    heads = query.shape[1]
    if tuple(slopes.shape) != (heads,) or not slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes must be floating point, one per head ([{heads}]), got "
            f"{slopes.dtype} {list(slopes.shape)}"
        )
    if slopes.device != query.device:
        raise ValueError(
            f"alibi_slopes is on {slopes.device}, the query on {query.device}; move it there"
        )
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return slopes.detach().to(dtype).resolve_neg().contiguous()
