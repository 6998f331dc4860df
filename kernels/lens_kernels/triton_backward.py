"""Kernel C: gradients from q, k, v, output and LSE, and what they say per block, by the way.

For gradients `dO` of the output and `h` of the LSE, with `P = exp(s - lse)` recomputed per tile:

    a_ij = dO_i . v_j                    dS_ij = P_ij (a_ij + level_i)
    level_i = h_i - dO_i . O_i           dq_i = scale sum_j dS'_ij k_j
    dv_j = sum_i P_ij dO_i               dk_j = scale sum_i dS'_ij q_i

where `dS'` is `dS` times the slope of the softcap. `levels` makes `level` and the row attribution
`dO . O`; `key_gradients` owns a tile of keys of one key-value head and loops over its query heads
and their tiles (so grouped heads are summed in order, without atomics); `query_gradients` owns a
tile of queries. In the tiles of `key_gradients` both `P` and `a` are at hand, so the block sums of
`P a`, `dS` and `|dS|` cost their additions only.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lens_kernels.triton_logits import (
    exponent_of_lse,
    is_kept,
    load_rows,
    logits,
    positions,
    products_of,
    row_ranges,
    store_rows,
    tanh,
    tile_of,
)
from lens_kernels.triton_lse_pass import block_sums, piece_places, query_tiles
from lens_kernels.triton_rows import key_span


class GradientMaps(NamedTuple):
    """Sums per block piece, [batch x heads, query pieces, key pieces], zero before; or None."""

    attribution: Any
    logit_gradient: Any
    logit_gradient_abs: Any


@triton.jit
def levels(output, of_output, of_lse, attribution, level, shape, tiles, BM: tl.constexpr):
    """Row sums `dO . O`, and `level`. Grid: [batch x heads x tiles].

    Args:
        output, of_output: `Rows`.
        of_lse: [batch, heads, queries], or None.
        attribution, level: [batch, heads, queries] float32.
    """
    pid = tl.program_id(0)
    line = pid // tiles
    row_first = pid % tiles * BM
    row_ahead = tl.arange(0, BM)  # [BM]
    row = row_first + row_ahead  # [BM]
    used = row < shape.queries  # [BM]
    batch = line // shape.heads
    head = line % shape.heads
    o = load_rows(output, batch, head, row_first, row_ahead, used)
    do = load_rows(of_output, batch, head, row_first, row_ahead, used)
    along = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
    place = line.to(tl.int64) * shape.queries + row  # [BM]
    tl.store(attribution + place, along, mask=used)
    base = -along  # [BM]
    if of_lse is not None:
        base += tl.load(of_lse + place, mask=used, other=0.0)  # [BM]
    tl.store(level + place, base, mask=used)


@triton.jit
def slope_of_cap(products, scores):
    """d s / d (scale * q.k) of a tile."""
    capped = tanh(products * scores.scale / scores.cap)
    return 1 - capped * capped


@triton.jit
def key_gradients(
    query,
    key,
    value,
    of_output,
    of_key,
    of_value,
    lse,
    level,
    mask,
    scores,
    kept,
    spans,
    scale,
    shape,
    rows,
    columns,
    row_tiles,
    tiles,
    SPLIT: tl.constexpr,
):
    """Gradients of keys and values. Grid: [batch x kv_heads x key tiles].

    Args:
        query, key, value, of_output: `Rows`.
        of_key, of_value: `Rows`, or None.
        lse, level: [batch, heads, queries] float32.
        mask, scores, kept, spans, rows, columns, ...: as in triton_lse_pass.columns_pass.
        scale: natural.
        SPLIT: whether tiles that all rows see wholly have a loop of their own, without a mask; for
            a simple mask without blocks.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    kv_heads = shape.heads // shape.share
    kv_head = pid // tiles % kv_heads
    batch = pid // tiles // kv_heads

    column_first, column_ahead, column_used = positions(tile, columns, shape.keys)  # [BN]
    column = column_first + column_ahead  # [BN]
    k = load_rows(key, batch, kv_head, column_first, column_ahead, column_used)  # [BN, D]
    v = load_rows(value, batch, kv_head, column_first, column_ahead, column_used)  # [BN, V]
    unit = 1.0
    if scores.folded:
        unit = scores.scale
    if mask.low is None:
        begin, first, second, end = query_tiles(column, column_used, mask, rows, row_tiles, shape)
    else:
        begin = tl.load(spans + (batch * tiles + tile) * 2)
        end = tl.load(spans + (batch * tiles + tile) * 2 + 1)
        first = end
        second = end
    if not SPLIT:
        first = end
    STRETCHES: tl.constexpr = 1 if not SPLIT else (2 if mask.window is None else 3)

    dk = tl.zeros([columns.lanes, key.dim], tl.float32)  # [BN, D]
    dv = tl.zeros([columns.lanes, value.dim], tl.float32)  # [BN, V]
    for member in range(0, shape.share):
        head = kv_head * shape.share + member
        line = batch * shape.heads + head
        lse_of_head = lse + line.to(tl.int64) * shape.queries
        level_of_head = level + line.to(tl.int64) * shape.queries
        for stretch in tl.static_range(0, STRETCHES):
            lower = begin if stretch == 0 else (first if stretch == 1 else second)
            upper = first if stretch == 0 else (second if stretch == 1 else end)
            for row_tile in range(lower, upper):
                visited = True
                if kept is not None:
                    visited = is_kept(kept, batch, head, row_tile, rows, tile, columns)
                if visited:
                    row_first, row_ahead, row_used = positions(
                        row_tile, rows, shape.queries
                    )  # [BM]
                    row = row_first + row_ahead  # [BM]
                    q = load_rows(query, batch, head, row_first, row_ahead, row_used)  # [BM, D]
                    total = exponent_of_lse(lse_of_head, row, row_used)  # [BM]
                    low, high, anchor = row_ranges(mask, batch, row, shape)  # [BM]
                    products = products_of(k, q, scores.precision)  # [BN, BM]
                    x = logits(
                        products,
                        row[None, :],
                        column[:, None],
                        low[None, :],
                        high[None, :],
                        anchor[None, :],
                        mask,
                        scores,
                        batch,
                        head,
                        shape,
                        stretch != 1,
                    )  # [BN, BM]
                    if stretch != 1:
                        x = tl.where(column_used[:, None], x, float("-inf"))  # [BN, BM]
                    p = tl.exp2(x * unit - total[None, :])  # [BN, BM]
                    do = load_rows(
                        of_output, batch, head, row_first, row_ahead, row_used
                    )  # [BM, V]
                    if of_value is not None:
                        dv = tl.dot(
                            p.to(do.dtype), do, dv, input_precision=scores.precision
                        )  # [BN, V]
                    if of_key is not None:
                        a = products_of(v, do, scores.precision)  # [BN, BM]
                        base = tl.load(level_of_head + row, mask=row_used, other=0.0)  # [BM]
                        ds = p * (a + base[None, :])  # [BN, BM]
                        if scores.cap is not None:
                            ds = ds * slope_of_cap(products, scores)  # [BN, BM]
                        dk = tl.dot(
                            ds.to(q.dtype), q, dk, input_precision=scores.precision
                        )  # [BN, D]
    if of_value is not None:
        store_rows(dv, of_value, batch, kv_head, column_first, column_ahead, column_used)
    if of_key is not None:
        store_rows(dk * scale, of_key, batch, kv_head, column_first, column_ahead, column_used)


@triton.jit
def query_gradients(
    query,
    key,
    value,
    of_output,
    of_query,
    maps,
    lse,
    level,
    mask,
    scores,
    kept,
    scale,
    shape,
    rows,
    columns,
    tiles,
    column_tiles,
    map_size,
    SPLIT: tl.constexpr,
):
    """Gradients of queries, and block sums. Grid: [batch x heads x query tiles], longest first.

    Args:
        query, key, value, of_output: `Rows`.
        of_query: `Rows`, or None.
        maps: `GradientMaps`.
        kept: `Kept`, or None; with it a tile holds one piece along each axis.
        SPLIT: as in triton_forward.
        others: as in `key_gradients`.
    """
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    line = pid // tiles
    batch = line // shape.heads
    head = line % shape.heads
    kv_head = head // shape.share

    row_first, row_ahead, row_used = positions(tile, rows, shape.queries)  # [BM]
    row = row_first + row_ahead  # [BM]
    low, high, anchor = row_ranges(mask, batch, row, shape)  # [BM]
    q = load_rows(query, batch, head, row_first, row_ahead, row_used)  # [BM, D]
    do = load_rows(of_output, batch, head, row_first, row_ahead, row_used)  # [BM, V]
    total = exponent_of_lse(lse + line.to(tl.int64) * shape.queries, row, row_used)  # [BM]
    place = line.to(tl.int64) * shape.queries + row  # [BM]
    base = tl.load(level + place, mask=row_used, other=0.0)  # [BM]
    unit = 1.0
    if scores.folded:
        unit = scores.scale

    ALIGNED: tl.constexpr = columns.size == columns.width * columns.parts
    begin = 0
    end = column_tiles
    middle = 0  # tiles before it are masked for no row
    if kept is None:
        last_row = tl.max(tl.where(row_used, row, 0), 0)
        begin, end, shared_end = key_span(low, high, mask, row_first, last_row, shape)
        begin = tile_of(begin, columns)
        end = tl.where(end > 0, tile_of(tl.maximum(end - 1, 0), columns) + 1, 0)
        middle = begin
        if SPLIT and ALIGNED:
            middle = shared_end // columns.lanes

    dq = tl.zeros([rows.lanes, query.dim], tl.float32)  # [BM, D]
    for stretch in tl.static_range(0, 2 if (SPLIT and ALIGNED) else 1):
        lower = middle if stretch == 0 else 0
        upper = end if stretch == 0 else middle
        for column_tile in range(lower, upper):
            visited = True
            if kept is not None:
                visited = is_kept(kept, batch, head, tile, rows, column_tile, columns)
            if visited:
                column_first, column_ahead, column_used = positions(
                    column_tile, columns, shape.keys
                )  # [BN]
                column = column_first + column_ahead  # [BN]
                read = None
                if stretch == 0:
                    read = column_used
                k = load_rows(key, batch, kv_head, column_first, column_ahead, read)  # [BN, D]
                v = load_rows(value, batch, kv_head, column_first, column_ahead, read)  # [BN, V]
                products = tl.dot(q, tl.trans(k), input_precision=scores.precision)  # [BM, BN]
                x = logits(
                    products,
                    row[:, None],
                    column[None, :],
                    low[:, None],
                    high[:, None],
                    anchor[:, None],
                    mask,
                    scores,
                    batch,
                    head,
                    shape,
                    stretch == 0,
                )  # [BM, BN]
                if stretch == 0:
                    x = tl.where(column_used[None, :], x, float("-inf"))  # [BM, BN]
                p = tl.exp2(x * unit - total[:, None])  # [BM, BN]
                a = tl.dot(do, tl.trans(v), input_precision=scores.precision)  # [BM, BN]
                ds = p * (a + base[:, None])  # [BM, BN]
                places, inside = piece_places(
                    map_size, line, tile, rows, column_tile, columns, False
                )  # [HIGH, WIDE]
                if maps.attribution is not None:
                    pieces = block_sums(p * a, rows, columns)
                    tl.store(maps.attribution + places, pieces, mask=inside)
                if maps.logit_gradient is not None:
                    pieces = block_sums(ds, rows, columns)
                    tl.store(maps.logit_gradient + places, pieces, mask=inside)
                if maps.logit_gradient_abs is not None:
                    pieces = block_sums(tl.abs(ds), rows, columns)
                    tl.store(maps.logit_gradient_abs + places, pieces, mask=inside)
                if of_query is not None:
                    if scores.cap is not None:
                        ds = ds * slope_of_cap(products, scores)  # [BM, BN]
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=scores.precision)  # [BM, D]
    if of_query is not None:
        store_rows(dq * scale, of_query, batch, head, row_first, row_ahead, row_used)
