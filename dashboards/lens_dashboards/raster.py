"""The numbers behind the block map: any rectangle of one head, at the sharpest level that fits.

Four levels. `tokens`: exact probabilities of single tokens, recomputed from the stored q, k and LSE
where the rectangle is small. `pixels`: the same where a rectangle has more tokens than a screen has cells, the
largest (or the mean) exact probability of several; of more than `MOST_EXACT` tokens a side of some of the queries of
each cell, spread evenly. Without q and k, and of long cross-attention, `blocks`: block mass as captured, and `pooled`: where it has more blocks
than cells, the largest (or the mean) of several.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.common.colors import VIRIDIS
from lens.common.errors import LensError
from lens.traces.pixels import Pooling, pooled
from lens.traces.trace import AttentionTrace

MOST_CELLS = 512
"""Cells a side that are sent at once."""
MOST_EXACT = {"max": 16_384, "mean": 8192}
"""Tokens a side of which every probability is looked at for one picture: about 0.4 s of one core."""
MOST_CROSS = 4096
"""The same of cross-attention, beyond which it is drawn from block mass."""
_STRIP = 256  # queries of which probabilities are held at once


@dataclass(frozen=True)
class Raster:
    """One rectangle.

    Attributes:
        values: [rows, columns] float32; NaN where no query may see the key.
        level: `tokens`, `pixels`, `blocks` or `pooled`.
        query_start, key_start: first token of the first row and column.
        cell: tokens a side of a cell.
        query_cell: queries of a cell: as many, except of cross-attention between a short target and a long source.
        query_end, key_end: the last token of the rectangle, exclusive.
        every: of `pixels`, one of so many queries was looked at.
        variant: `raw`; `sink_excluded`: key 0 is left out and each row is rescaled to a sum of 1, which
            only single tokens allow.
    """

    values: np.ndarray
    level: str
    query_start: int
    key_start: int
    cell: int
    query_cell: int
    query_end: int
    key_end: int
    variant: str = "raw"
    every: int = 1


def raster(
    trace: AttentionTrace,
    layer: int,
    head: int,
    window: tuple[int, int, int, int] | None = None,
    pooling: Pooling = "max",
    variant: str = "raw",
    most: int = MOST_CELLS,
) -> Raster:
    """The rectangle (q0, q1, k0, k1) in tokens, or everything, in at most so many cells a side; blocks are always raw.

    Raises:
        LensError: a head that is not there, or a rectangle outside the prompt.
    """
    trace.head_id((layer, head))
    queries, keys = trace.queries, trace.length
    q0, q1, k0, k1 = window or (0, queries, 0, keys)
    q1, k1 = min(q1, queries), min(k1, keys)
    if not (0 <= q0 < q1 and 0 <= k0 < k1):
        raise LensError(
            f"the prompt has queries 0 to {queries - 1} and keys 0 to {keys - 1}; got the rectangle {window}"
        )
    size = max(q1 - q0, k1 - k0)
    down, step = cell_sides(trace, (q1 - q0, k1 - k0), most)
    if trace.tile_refusal(layer, head) or (trace.cross and size > MOST_CROSS):
        return _blocks(trace, layer, head, (q0, q1, k0, k1), pooling, most)
    if step > 1 and not trace.cross:
        rows = max(1, int(step * min(1.0, (MOST_EXACT[pooling] / size) ** 2)))
        values = pooled(
            trace.dataset,
            trace.head_id((layer, head)),
            (q0, q1),
            (k0, k1),
            step,
            pooling=pooling,
            rows=rows,
            without_first=variant != "raw",
        )
        values, every = blank(values, trace, q0, k0, step), -(-step // rows)
        return Raster(values, "pixels", q0, k0, step, down, q1, k1, variant, every)
    rows = max(down, _STRIP // down * down)
    strips = [
        _exact(trace, layer, head, (start, min(start + rows, q1), k0, k1), variant)
        for start in range(q0, q1, rows)
    ]
    if max(step, down) > 1:
        strips = [pool(values, (down, step), pooling) for values in strips]
    level = "tokens" if max(step, down) == 1 else "pixels"
    return Raster(np.concatenate(strips), level, q0, k0, step, down, q1, k1, variant)


def _exact(
    trace: AttentionTrace, layer: int, head: int, window: tuple[int, int, int, int], variant: str
) -> np.ndarray:
    q0, q1, k0, k1 = window
    values = trace.tile(layer, head, (q0, q1), (k0, k1))
    if variant != "raw":
        values = _without_first(values, trace.tile(layer, head, (q0, q1), (0, 1)), k0)
    return blank(values.astype(np.float32), trace, q0, k0, 1)


def row(
    trace: AttentionTrace, layer: int, head: int, query: int, variant: str = "raw"
) -> np.ndarray:
    """[keys] exact probabilities of one query; NaN at key 0 when it is left out.

    Raises:
        LensError: no such query, or q and k were not kept.
    """
    if not 0 <= query < trace.queries:
        raise LensError(
            f"the prompt has tokens 0 to {trace.queries - 1}; there is no query {query}"
        )
    values = trace.tile(layer, head, (query, query + 1), (0, trace.length))
    if variant != "raw":
        values = _without_first(values, values[:, :1], 0)
    return values[0].astype(np.float32)


def _without_first(values: np.ndarray, first: np.ndarray, start: int) -> np.ndarray:
    """`p_ij / (1 - p_i0)` with key 0 blank; rows that see nothing else are blank."""
    rest = 1.0 - first
    found = np.divide(values, rest, out=np.full(values.shape, np.nan), where=rest > 1e-9)
    if start == 0:
        found[:, 0] = np.nan
    return found


def _blocks(
    trace: AttentionTrace,
    layer: int,
    head: int,
    window: tuple[int, int, int, int],
    pooling: Pooling,
    most: int,
) -> Raster:
    size = trace.attrs["block_size"]
    q0, q1, k0, k1 = window
    rows, columns = slice(q0 // size, -(-q1 // size)), slice(k0 // size, -(-k1 // size))
    values = (
        trace.dataset["block_mass"]
        .sel(layer=layer, head=head)
        .isel(query_block=rows, key_block=columns)
        .values.astype(np.float32)
    )
    step = -(-max(values.shape) // most)
    if step > 1:
        values = pool(values, step, pooling)
    start_q, start_k, cell = rows.start * size, columns.start * size, size * step
    level = "pooled" if step > 1 else "blocks"
    shown = blank(values, trace, start_q, start_k, cell)
    end_q, end_k = min(rows.stop * size, trace.queries), min(columns.stop * size, trace.length)
    return Raster(shown, level, start_q, start_k, cell, cell, end_q, end_k)


def cell_sides(trace: AttentionTrace, shape: tuple[int, ...], most: int) -> tuple[int, int]:
    """Rows and columns of one cell of at most so many a side: squares, except of cross-attention, whose sides differ."""
    down, right = (-(-length // most) for length in shape)
    side = max(down, right)
    return (down, right) if trace.cross else (side, side)


def pool(values: np.ndarray, step: int | tuple[int, int], pooling: Pooling) -> np.ndarray:
    """Squares of `step` cells a side (or of so many rows and columns) as one: the largest or the mean of what is known;
    NaN where nothing is."""
    down, right = (step, step) if isinstance(step, int) else step
    pad = [(0, -length % side) for length, side in zip(values.shape, (down, right), strict=True)]
    padded = np.pad(values, pad, constant_values=np.nan)
    rows, columns = padded.shape[0] // down, padded.shape[1] // right
    tiles = padded.reshape(rows, down, columns, right)
    known = ~np.isnan(tiles)
    count = known.sum((1, 3))
    if pooling == "max":
        found = np.where(known, tiles, -np.inf).max((1, 3))
    else:
        found = np.where(known, tiles, 0).sum((1, 3)) / np.maximum(count, 1)
    return np.where(count > 0, found, np.nan).astype(values.dtype)


def blank(values: np.ndarray, trace: AttentionTrace, q0: int, k0: int, cell: int) -> np.ndarray:
    """NaN above the diagonal of a causal model: nothing can be there."""
    if not trace.attrs["causal"]:
        return values
    rows, columns = (np.arange(length) * cell for length in values.shape)
    last_query = np.minimum(q0 + rows + cell - 1, trace.length - 1)
    return np.where(k0 + columns[None] > last_query[:, None], np.float32(np.nan), values)


def of_head(trace: AttentionTrace, layer: int, head: int) -> dict[str, Any]:
    """What the script must know about a head before its first rectangle."""
    return {
        "layer": layer,
        "head": head,
        "palette": list(VIRIDIS),
        "causal": bool(trace.attrs["causal"]),
        "promptTokens": trace.attrs.get("prompt_tokens"),
        "queries": trace.query_tokens if trace.cross else None,
        "seconds": trace.attrs.get("seconds_per_position"),
    }


def header(trace: AttentionTrace, found: Raster, pooling: str = "max") -> dict[str, Any]:
    """What the script must know about a rectangle beside its numbers."""
    rows, columns = found.values.shape
    return {
        "rows": rows,
        "columns": columns,
        "level": found.level,
        "cell": found.cell,
        "queryCell": found.query_cell,
        "query": [found.query_start, found.query_end],
        "key": [found.key_start, found.key_end],
        "length": trace.length,
        "block": trace.attrs["block_size"],
        "pooling": pooling,
        "variant": found.variant,
        "every": found.every,
    }
