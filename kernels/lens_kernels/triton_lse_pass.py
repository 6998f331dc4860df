"""Kernel B: what needs the whole row's LSE first. `P = exp(s - lse)` is recomputed tile by tile.

With `P` at hand every statistic is a plain sum or maximum: no rescaling, no rows x blocks scratch.

`columns` owns a tile of BN keys and loops over tiles of BM queries; its tiles are transposed
[BN, BM], keys along the rows of the matrix product, so that the sum over queries (received mass)
stays in the registers of the keys, and the block maps are sums of those sums. Each entry of each
output has one program that writes it: no atomics, the same bits on every run.

`diagonals` owns a block diagonal: the square tiles (I, I - d) for one d. In all of them the entry
(r, c) has the same distance `anchor - key`, so the tiles are added up as they are and the sum is
folded along its diagonals once, at the end. Two neighbouring block diagonals meet in each distance;
the host adds the two. Compared with a walk along every single diagonal this multiplies nothing
twice; compared with the column walk it cannot keep its keys, so it is a pass of its own.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lens_kernels.triton_logits import (
    LN2,
    exponent_of_lse,
    is_kept,
    load_rows,
    logits,
    positions,
    products_of,
    row_ranges,
    tile_of,
)


class MapSize(NamedTuple):
    """Number of pieces of each axis of a block map."""

    height: Any
    width: Any


class ColumnOutputs(NamedTuple):
    """Where results go, contiguous, of the launched heads only; None is not computed.

    Maps are [lines, query pieces, key pieces] (`Blocks`), filled with 0 or -inf before; `mass` and
    `weighted` are sums, not means.
    """

    received: Any  # [lines, keys]
    mass: Any
    largest: Any
    largest_logit: Any
    weighted: Any


@triton.jit
def query_tiles(column, column_used, mask, rows, tiles, shape):
    """Tiles of queries that see any key of a tile, and those in which all rows see all keys."""
    key_first = tl.min(tl.where(column_used, column, shape.keys), 0)
    key_last = tl.max(tl.where(column_used, column, 0), 0)
    begin_row = 0
    inner_row = 0
    end_row = shape.queries
    inner_end_row = tiles * rows.lanes
    if mask.causal:
        begin_row = tl.maximum(key_first - mask.offset, 0)
        inner_row = tl.maximum(key_last - mask.offset, 0)
    elif mask.window is not None:
        begin_row = tl.maximum(key_first - mask.offset - mask.window + 1, 0)
        inner_row = tl.maximum(key_last - mask.offset - mask.window + 1, 0)
    if mask.window is not None:
        end_row = tl.minimum(end_row, tl.maximum(key_last - mask.offset + mask.window, 0))
        inner_end_row = tl.minimum(
            inner_end_row, tl.maximum(key_first - mask.offset + mask.window, 0)
        )
    begin = tile_of(begin_row, rows)
    end = tl.where(end_row > 0, tile_of(tl.maximum(end_row - 1, 0), rows) + 1, 0)
    begin = tl.minimum(begin, end)
    whole = tl.min(column_used.to(tl.int32), 0)
    if rows.size != rows.width * rows.parts:
        whole = 0
    first = tl.where(whole != 0, tl.cdiv(inner_row, rows.lanes), end)
    first = tl.minimum(tl.maximum(first, begin), end)
    second = tl.maximum(tl.minimum(inner_end_row // rows.lanes, end), first)
    return begin, first, second, end


@triton.jit
def block_sums(tile, tall, wide):
    """[lanes of `tall`, lanes of `wide`] summed over pieces: [pieces, pieces] of the tile."""
    HIGH: tl.constexpr = tall.lanes // tall.width
    WIDE: tl.constexpr = wide.lanes // wide.width
    if WIDE == 1:
        lines = tl.sum(tile, 1)  # [lanes]
        pieces = tl.sum(tl.reshape(lines, [HIGH, tall.width]), 1)[:, None]  # [HIGH, 1]
    else:
        lines = tl.sum(tl.reshape(tile, [tall.lanes, WIDE, wide.width]), 2)  # [lanes, WIDE]
        pieces = tl.sum(tl.reshape(lines, [HIGH, tall.width, WIDE]), 1)  # [HIGH, WIDE]
    return pieces


@triton.jit
def block_maxima(tile, tall, wide):
    """As `block_sums`, the maximum."""
    HIGH: tl.constexpr = tall.lanes // tall.width
    WIDE: tl.constexpr = wide.lanes // wide.width
    if WIDE == 1:
        lines = tl.max(tile, 1)  # [lanes]
        pieces = tl.max(tl.reshape(lines, [HIGH, tall.width]), 1)[:, None]  # [HIGH, 1]
    else:
        lines = tl.max(tl.reshape(tile, [tall.lanes, WIDE, wide.width]), 2)  # [lanes, WIDE]
        pieces = tl.max(tl.reshape(lines, [HIGH, tall.width, WIDE]), 1)  # [HIGH, WIDE]
    return pieces


@triton.jit
def piece_places(map_size, line, row_tile, rows, column_tile, columns, KEYS_FIRST: tl.constexpr):
    """Where the pieces of a tile lie in a map [lines, height, width], and which of them do."""
    row = row_tile * (rows.lanes // rows.width) + tl.arange(0, rows.lanes // rows.width)
    column = column_tile * (columns.lanes // columns.width)
    column += tl.arange(0, columns.lanes // columns.width)
    if KEYS_FIRST:
        row = row[None, :]
        column = column[:, None]
    else:
        row = row[:, None]
        column = column[None, :]
    place = (line.to(tl.int64) * map_size.height + row) * map_size.width + column
    return place, (row < map_size.height) & (column < map_size.width)


@triton.jit
def columns_pass(
    query,
    key,
    lse,
    outs,
    key_weights,
    mask,
    scores,
    kept,
    spans,
    shape,
    rows,
    columns,
    row_tiles,
    tiles,
    map_size,
    first_line,
):
    """Grid: [lines x key tiles], tiles fastest; a line is a head of a batch row.

    Args:
        query, key: `Rows`.
        lse: [batch, heads, queries] float32.
        outs: `ColumnOutputs`.
        key_weights: [batch, heads, keys] float32, or None.
        mask, scores, shape: see triton_logits.
        kept: `Kept`, or None; with it a tile holds one piece along each axis.
        spans: [batch, tiles, 2], the query tiles to visit, where the mask is not simple; or None.
        rows, columns: `Blocks` of the two axes.
        row_tiles, tiles: number of tiles of each axis.
        map_size: `MapSize`.
        first_line: the first head of this launch.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    line = pid // tiles  # of this launch
    batch = (line + first_line) // shape.heads
    head = (line + first_line) % shape.heads

    column_first, column_ahead, column_used = positions(tile, columns, shape.keys)  # [BN]
    column = column_first + column_ahead  # [BN]
    k = load_rows(
        key, batch, head // shape.share, column_first, column_ahead, column_used
    )  # [BN, D]
    weights = tl.zeros([columns.lanes], tl.float32)  # [BN]
    if outs.weighted is not None:
        place = (batch * shape.heads + head).to(tl.int64) * shape.keys + column  # [BN]
        weights = tl.load(key_weights + place, mask=column_used, other=0.0)  # [BN]
    lse_of_head = lse + (batch * shape.heads + head).to(tl.int64) * shape.queries
    unit = 1.0
    if scores.folded:
        unit = scores.scale

    SPLIT: tl.constexpr = mask.low is None and kept is None
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

    received = tl.zeros([columns.lanes], tl.float32)  # [BN]
    for stretch in tl.static_range(0, STRETCHES):
        lower = begin if stretch == 0 else (first if stretch == 1 else second)
        upper = first if stretch == 0 else (second if stretch == 1 else end)
        for row_tile in range(lower, upper):
            visited = True
            if kept is not None:
                visited = is_kept(kept, batch, head, row_tile, rows, tile, columns)
            if visited:
                row_first, row_ahead, row_used = positions(row_tile, rows, shape.queries)  # [BM]
                row = row_first + row_ahead  # [BM]
                q = load_rows(query, batch, head, row_first, row_ahead, row_used)  # [BM, D]
                level = exponent_of_lse(lse_of_head, row, row_used)  # [BM]
                low, high, anchor = row_ranges(mask, batch, row, shape)  # [BM]
                products = tl.dot(k, tl.trans(q), input_precision=scores.precision)  # [BN, BM]
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
                p = tl.exp2(x * unit - level[None, :])  # [BN, BM]
                if outs.received is not None:
                    received += tl.sum(p, 1)  # [BN]
                places, inside = piece_places(
                    map_size, line, row_tile, rows, tile, columns, True
                )  # [HIGH, WIDE]
                if outs.mass is not None:
                    pieces = block_sums(p, columns, rows)
                    tl.store(outs.mass + places, pieces, mask=inside)
                if outs.weighted is not None:
                    pieces = block_sums(p * weights[:, None], columns, rows)
                    tl.store(outs.weighted + places, pieces, mask=inside)
                if outs.largest is not None:
                    pieces = block_maxima(p, columns, rows)
                    tl.store(outs.largest + places, pieces, mask=inside)
                if outs.largest_logit is not None:
                    of_rows = tl.where(level[None, :] < float("inf"), x, float("-inf"))
                    pieces = block_maxima(of_rows, columns, rows) * unit * LN2
                    tl.store(outs.largest_logit + places, pieces, mask=inside)
    if outs.received is not None:
        tl.store(
            outs.received + line.to(tl.int64) * shape.keys + column, received, mask=column_used
        )


@triton.jit
def diagonals_pass(
    query,
    key,
    lse,
    output,
    mask,
    scores,
    kept,
    spans,
    shape,
    rows,
    columns,
    row_tiles,
    column_tiles,
    first_difference,
    differences,
    T: tl.constexpr,
):
    """Grid: [batch x heads x differences], differences fastest.

    Args:
        query, key: `Rows`.
        lse: [batch, heads, queries] float32.
        output: [batch, heads, differences, 2 T] float32: entry `u` of block diagonal `d` is the sum
            over its tiles of the entries with `r - c = u + 1 - T`; see `unfold_diagonals`.
        mask, scores, shape: see triton_logits.
        kept: `Kept`, or None, read entry by entry.
        spans: [batch, differences, 2], the query tiles to visit, where the mask is not simple.
        rows, columns: `Blocks` of `kept`.
        row_tiles, column_tiles: number of tiles of T along each axis.
        first_difference, differences: of `I - J`.
    """
    pid = tl.program_id(0)
    difference = first_difference + pid % differences
    batch = pid // differences // shape.heads
    head = pid // differences % shape.heads
    lane = tl.arange(0, T)  # [T]
    lse_of_head = lse + (batch * shape.heads + head).to(tl.int64) * shape.queries
    unit = 1.0
    if scores.folded:
        unit = scores.scale

    begin = tl.maximum(difference, 0)
    end = tl.minimum(row_tiles, column_tiles + difference)
    first = begin  # tiles before it are seen wholly
    SPLIT: tl.constexpr = mask.low is None and kept is None
    if mask.low is not None:
        span = spans + (batch * differences + pid % differences) * 2
        begin = tl.load(span)
        end = tl.load(span + 1)
        first = begin
    if SPLIT:
        middle = mask.offset + difference * T
        whole = True
        if mask.causal:
            whole = whole & (middle - T + 1 >= 0)
        if mask.window is not None:
            whole = whole & (middle + T - 1 < mask.window)
            if not mask.causal:
                whole = whole & (middle - T + 1 > -mask.window)
        full = tl.minimum(end, shape.keys // T + difference)
        first = tl.where(whole, tl.maximum(full, begin), begin)

    acc = tl.zeros([T, T], tl.float32)  # [T, T]
    for stretch in tl.static_range(0 if SPLIT else 1, 2):
        lower = begin if stretch == 0 else first
        upper = first if stretch == 0 else end
        for row_tile in range(lower, upper):
            start = (row_tile - difference) * T
            row = row_tile * T + lane  # [T]
            column = start + lane  # [T]
            column_used = None
            if stretch == 1:
                column_used = column < shape.keys  # [T]
            row_used = row < shape.queries  # [T]
            q = load_rows(query, batch, head, row_tile * T, lane, row_used)  # [T, D]
            k = load_rows(key, batch, head // shape.share, start, lane, column_used)  # [T, D]
            level = exponent_of_lse(lse_of_head, row, row_used)  # [T]
            low, high, anchor = row_ranges(mask, batch, row, shape)  # [T]
            products = products_of(q, k, scores.precision)  # [T, T]
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
                stretch == 1,
            )  # [T, T]
            if kept is not None:
                place = batch.to(tl.int64) * kept.batch + head.to(tl.int64) * kept.head
                row_place = (row // rows.size).to(tl.int64) * kept.query_block  # [T]
                column_place = (column // columns.size).to(tl.int64) * kept.key_block  # [T]
                inside = row_used[:, None] & column_used[None, :]  # [T, T]
                flags = tl.load(
                    kept.pointer + place + row_place[:, None] + column_place[None, :],
                    mask=inside,
                    other=0,
                )  # [T, T]
                x = tl.where(flags != 0, x, float("-inf"))  # [T, T]
            acc += tl.exp2(x * unit - level[:, None])  # [T, T]

    # entry (r, c) moves to column (r - c - 1) mod T: diagonals become columns, two in each
    place = lane[None, :]  # [1, T]
    row = lane[:, None]  # [T, 1]
    folded = tl.gather(acc, (row - place - 1) & (T - 1), 1)  # [T, T]
    below = tl.sum(tl.where(place < row, folded, 0.0), 0)  # [T], r - c = place + 1
    above = tl.sum(tl.where(place >= row, folded, 0.0), 0)  # [T], r - c = place + 1 - T
    base = output + pid.to(tl.int64) * 2 * T + lane  # [T]
    tl.store(base, above)
    tl.store(base + T, below)
