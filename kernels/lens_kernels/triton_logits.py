"""What the Triton kernels share: tuples of arguments, the mask of a tile, logits, P, and tiles of blocks.

Kernels work in base 2. `logits` returns `x` with `s * log2(e) = x * unit`: for plain attention `x`
is the product `q.k` and `unit` the scale, so that scale, subtraction of the maximum and change of
base are one multiply-add per element; with softcap, bias or ALiBi `x` is all of it and `unit` is 1.

Arguments that belong together travel as named tuples. A field that is None is None at compile time:
what it stands for is not compiled in. Fields made by `tl.constexpr` are compile-time constants.

Triton reads TRITON_INTERPRET when a kernel is decorated, so this file is imported late.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2147483647)


class Shape(NamedTuple):
    """Sizes."""

    heads: Any
    share: Any  # heads per key-value head
    queries: Any
    keys: Any


class Rows(NamedTuple):
    """[batch, heads, positions, dim] in memory: strides, the last one being 1.

    `dim` is the width of a tile, a power of two, of which `used` columns are real.
    """

    pointer: Any
    batch: Any
    head: Any
    position: Any
    dim: Any
    used: Any


class Plane(NamedTuple):
    """[batch, heads, queries, keys] in memory; a broadcast axis has stride 0."""

    pointer: Any
    batch: Any
    head: Any
    query: Any
    key: Any


class Mask(NamedTuple):
    """The lowered mask (problem.MaskPlan); `low`, `high`, `anchor` are None where it is `simple`."""

    low: Any  # [batch, queries]
    high: Any  # [batch, queries]
    anchor: Any  # [batch, queries]
    keep: Any  # [batch, keys]
    allowed: Any  # Plane
    bias: Any  # Plane
    slopes: Any  # [heads]
    offset: Any
    window: Any
    causal: Any


class Scores(NamedTuple):
    """`s = cap(scale * q.k) ...`, in base 2. `folded`: the scale is applied with the exponential."""

    scale: Any  # times log2(e) where folded or without a cap
    cap: Any
    folded: Any
    precision: Any  # input_precision of tl.dot


class Blocks(NamedTuple):
    """How one axis is cut into tiles that respect blocks.

    A block of `size` positions is cut into `parts` pieces of `width` lanes (a power of two), the
    last of which may have idle lanes. A tile of `lanes` holds `lanes // width` whole pieces, so no
    block of `width` lanes or less crosses a tile. Where `size == width * parts`, lanes are
    consecutive positions.
    """

    size: Any
    width: Any
    parts: Any
    lanes: Any


class Kept(NamedTuple):
    """A block mask: flags [batch, heads, query_blocks, key_blocks]; broadcast axes have stride 0."""

    pointer: Any
    batch: Any
    head: Any
    query_block: Any
    key_block: Any


@triton.jit
def positions(tile, blocks, length):
    """Positions of the lanes of a tile: the first one, how far each lane is from it, which are used.

    int32, [lanes] int32, [lanes] bool.
    """
    lane = tl.arange(0, blocks.lanes)  # [lanes]
    if blocks.size == blocks.width * blocks.parts:
        first = tile * blocks.lanes
        ahead = lane  # [lanes]
        used = first + lane < length  # [lanes]
    else:
        start = tile * (blocks.lanes // blocks.width)  # first piece
        first = start // blocks.parts * blocks.size + start % blocks.parts * blocks.width
        piece = start + lane // blocks.width  # [lanes]
        inside = piece % blocks.parts * blocks.width + lane % blocks.width  # [lanes]
        ahead = piece // blocks.parts * blocks.size + inside - first  # [lanes]
        used = (inside < blocks.size) & (first + ahead < length)  # [lanes]
    return first, ahead, used


@triton.jit
def tile_of(position, blocks):
    """The tile in which a position lies."""
    piece = position // blocks.size * blocks.parts + position % blocks.size // blocks.width
    return piece // (blocks.lanes // blocks.width)


@triton.jit
def row_pointers(rows, batch, head, first, ahead):
    """[P, D] of the positions `first + ahead`. Only the offset of `first` needs 64 bits."""
    base = rows.pointer + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head
    base += tl.cast(first, tl.int64) * rows.position
    return base + (ahead * rows.position)[:, None] + tl.arange(0, rows.dim)[None, :]


@triton.jit
def load_rows(rows, batch, head, first, ahead, used):
    """[P, D] of the positions; 0 past the real width and where not `used` (None: all are)."""
    pointers = row_pointers(rows, batch, head, first, ahead)  # [P, D]
    column = tl.arange(0, rows.dim)  # [D]
    if used is None and rows.used == rows.dim:
        tile = tl.load(pointers)  # [P, D]
    elif used is None:
        tile = tl.load(pointers, mask=(column < rows.used)[None, :], other=0.0)  # [P, D]
    elif rows.used == rows.dim:
        tile = tl.load(pointers, mask=used[:, None], other=0.0)  # [P, D]
    else:
        inside = used[:, None] & (column < rows.used)[None, :]  # [P, D]
        tile = tl.load(pointers, mask=inside, other=0.0)  # [P, D]
    return tile


@triton.jit
def load_tile(tiles, rows, batch, head, first, ahead, used):
    """As `load_rows`, for consecutive positions: by their descriptor (`triton_launch.descriptor`) where there is one.

    It sets to 0 what lies past the last position and past the real width, and loads what is not `used` otherwise.
    """
    if tiles is None:
        tile = load_rows(rows, batch, head, first, ahead, used)  # [P, D]
    else:
        box = tiles.load([batch, head, first, 0])  # [1, 1, P, D]
        tile = tl.reshape(box, [ahead.shape[0], rows.dim])  # [P, D]
    return tile


@triton.jit
def store_rows(tile, rows, batch, head, first, ahead, used):
    """Writes [P, D] to the positions that are `used`."""
    pointers = row_pointers(rows, batch, head, first, ahead)  # [P, D]
    inside = used[:, None]  # [P, 1]
    if rows.used != rows.dim:
        inside = inside & (tl.arange(0, rows.dim) < rows.used)[None, :]  # [P, D]
    tl.store(pointers, tile.to(rows.pointer.dtype.element_ty), mask=inside)


@triton.jit
def row_ranges(mask, batch, row, shape):
    """First key, one past the last, and anchor of query rows: three times [R] int32.

    Rows past the end are taken for the last one, so that they widen no range.
    """
    row = tl.minimum(row, shape.queries - 1)  # [R]
    if mask.low is None:
        anchor = row + mask.offset  # [R]
        low = tl.zeros_like(row)  # [R]
        high = tl.zeros_like(row) + shape.keys  # [R]
        if mask.window is not None:
            low = tl.maximum(anchor - mask.window + 1, 0)  # [R]
            high = tl.minimum(high, tl.maximum(anchor + mask.window, 0))  # [R]
        if mask.causal:
            high = tl.minimum(high, tl.maximum(anchor + 1, 0))  # [R]
    else:
        place = batch.to(tl.int64) * shape.queries + row  # [R]
        low = tl.load(mask.low + place)  # [R]
        high = tl.load(mask.high + place)  # [R]
        anchor = tl.load(mask.anchor + place)  # [R]
    return low, high, anchor


@triton.jit
def logits(
    products,
    row,
    column,
    low,
    high,
    anchor,
    mask,
    scores,
    batch,
    head,
    shape,
    MASKED: tl.constexpr,
):
    """`x` of a tile, -inf where hidden, from its products `q.k`.

    `row`, `low`, `high` and `anchor` are [BM, 1] and `column` [1, BN] for a tile [BM, BN], or
    [1, BM] and [BN, 1] for its transpose. Without MASKED every key of the tile is in the range of every row.
    """
    x = products
    if not scores.folded:
        x = x * scores.scale
        if scores.cap is not None:
            x = tanh(x / scores.cap) * (scores.cap * LOG2E)
        if mask.bias is not None:
            bias = mask.bias
            base = bias.pointer + batch.to(tl.int64) * bias.batch + head.to(tl.int64) * bias.head
            place = row.to(tl.int64) * bias.query + column.to(tl.int64) * bias.key
            inside = (row < shape.queries) & (column < shape.keys)
            x += tl.load(base + place, mask=inside, other=0.0).to(tl.float32) * LOG2E
        if mask.slopes is not None:
            slope = tl.load(mask.slopes + head) * LOG2E
            x -= tl.abs(anchor - column).to(tl.float32) * slope
    if MASKED:
        x = tl.where(column < high, x, float("-inf"))
        if mask.low is not None or mask.window is not None:
            x = tl.where(column >= low, x, float("-inf"))
    if mask.keep is not None:
        inside = column < shape.keys
        keep = tl.load(mask.keep + batch.to(tl.int64) * shape.keys + column, mask=inside, other=0)
        x = tl.where(keep != 0, x, float("-inf"))
    if mask.allowed is not None:
        allowed = mask.allowed
        base = allowed.pointer + batch.to(tl.int64) * allowed.batch
        base += head.to(tl.int64) * allowed.head
        place = row.to(tl.int64) * allowed.query + column.to(tl.int64) * allowed.key
        inside = (row < shape.queries) & (column < shape.keys)
        x = tl.where(tl.load(base + place, mask=inside, other=0) != 0, x, float("-inf"))
    return x


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few ulp, also near 0, where `1 - 2 / (exp(2x) + 1)` loses digits."""
    square = x * x
    series = x * (1 - square * (0.33333334 - square * (0.13333334 - square * 0.053968254)))
    power = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - power) / (1 + power)
    return tl.where(square < 0.04, series, tl.where(x < 0, -far, far))


@triton.jit
def products_of(left, right, precision: tl.constexpr):
    """`left @ right'` [L, R] of [L, D] and [R, D].

    Without tensor cores each thread holds whole rows of both, so that wide float32 tiles are cut in
    halves along D until those are at most twice as wide as `left` is tall, and fit into registers.
    """
    if left.dtype == tl.float32 and precision == "ieee" and left.shape[1] > 2 * left.shape[0]:
        left_half, left_rest = halves(left)
        right_half, right_rest = halves(right)
        first = products_of(left_half, right_half, precision)  # [L, R]
        products = first + products_of(left_rest, right_rest, precision)  # [L, R]
    else:
        products = tl.dot(left, tl.trans(right), input_precision=precision)  # [L, R]
    return products


@triton.jit
def halves(tile):
    """Every second column of [P, D], and the others: twice [P, D / 2]."""
    return tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))


@triton.jit
def exponent_of_lse(pointer, row, used):
    """LSE of rows [R] in base 2; +inf for unused rows and rows without keys, which makes P = 0."""
    lse = tl.load(pointer + row, mask=used, other=float("inf")) * LOG2E  # [R]
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def is_kept(kept, batch, head, row_tile, rows, column_tile, columns):
    """The flag of the block in which a pair of tiles of one piece each lies."""
    base = kept.pointer + batch.to(tl.int64) * kept.batch + head.to(tl.int64) * kept.head
    place = row_tile // rows.parts * kept.query_block
    place += column_tile // columns.parts * kept.key_block
    return tl.load(base + place) != 0
