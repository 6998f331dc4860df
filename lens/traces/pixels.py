"""The largest exact probability in each cell of a picture, from q, k and LSE, at any zoom into any length.

`max exp(s_ij - lse_i)` over the queries and keys of a cell is `exp(max(s_ij - lse_i))`: one product of matrices and
maxima, strip by strip, and an exponential of each cell alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from lens.common.head_ids import HeadId
from lens.traces.tiles import position_of, read, seen_ranges

_STRIP = 128  # queries of which scores are held at once


def largest(
    dataset: xr.Dataset,
    head: HeadId,
    queries: tuple[int, int],
    keys: tuple[int, int],
    cell: int,
    *,
    rows: int | None = None,
    without_first: bool = False,
) -> np.ndarray:
    """[cells, cells] float32, the largest probability of each cell of so many tokens a side.

    Args:
        dataset: of a trace whose tiles are exact.
        head: which.
        queries, keys: ranges (first, past the last).
        cell: tokens a side; the last cells may have fewer.
        rows: queries of each cell that are looked at, spread evenly; all of them if None.
        without_first: key 0 is left out, and each row is divided by what is left.
    """
    layer, number = position_of(dataset, head.layer), head.head
    kv_head = number // (dataset.sizes["head"] // dataset.sizes["kv_head"])
    first, last = keys
    key = _padded(
        read(dataset, "k", np.float32, layer=layer, kv_head=kv_head, key=slice(*keys)), cell
    )
    first_key = read(dataset, "k", layer=layer, kv_head=kv_head, key=slice(0, 1))
    seen = np.zeros(len(key), dtype=bool)
    seen[: last - first] = read(dataset, "visible", layer=layer, key=slice(*keys)) > 0
    if without_first and first == 0:
        seen[0] = False
    blind = np.flatnonzero(~seen)
    scale, cap = dataset.attrs["scale"][layer], dataset.attrs["softcap"]
    causal, window = dataset.attrs["causal"], dataset.attrs["windows"][layer]
    ranges = seen_ranges(dataset.attrs, layer)
    if ranges is not None:
        causal, window = False, None
    found = np.zeros((-(-(queries[1] - queries[0]) // cell), len(key) // cell), np.float32)
    for start, at, each in _strips(queries, cell, min(rows or cell, cell)):
        query = read(dataset, "q", layer=layer, head=number, query=at) * scale
        lse = read(dataset, "lse", layer=layer, head=number, query=at)
        if without_first:
            lse = lse + _log_rest(_capped(query @ first_key.T, cap)[:, 0] - lse)
        query, lse = query.astype(np.float32), lse.astype(np.float32)
        stop = len(key) if not causal else min(len(key), -(-(at[-1] + 1 - first) // cell) * cell)
        if stop <= 0:
            continue
        s = _capped(query @ key[:stop].T, cap)
        s -= lse[:, None]
        for hidden, part in _hidden(at, first, stop, causal, window):
            s[:, part][hidden] = -np.inf
        if ranges is not None:
            low, past = ranges[:, at, None] - first
            places = np.arange(stop)
            s[(places < low) | (places >= past)] = -np.inf
        s[:, blind[blind < stop]] = -np.inf
        s = np.maximum.reduceat(s, np.arange(0, len(at), each), axis=0)
        s = s.reshape(len(s), stop // cell, cell).max(2)
        top = (start - queries[0]) // cell
        found[top : top + len(s), : s.shape[1]] = np.exp(s)
    return found


def _strips(
    queries: tuple[int, int], cell: int, rows: int
) -> Iterator[tuple[int, np.ndarray, int]]:
    """First query of a strip of whole cells, the queries that are looked at, and how many of them a cell has."""
    offsets = np.arange(rows) * cell // rows
    cells = max(1, _STRIP // rows)
    for start in range(queries[0], queries[1], cells * cell):
        corners = np.arange(start, min(start + cells * cell, queries[1]), cell)
        at = (corners[:, None] + offsets).ravel()
        yield start, at[at < queries[1]], rows


def _hidden(
    at: np.ndarray, first: int, stop: int, causal: bool, window: int | None
) -> Iterator[tuple[np.ndarray, slice]]:
    """What the mask hides: [queries, keys] of a range of the keys, which are counted from `first`."""
    anchor = at[:, None] - first

    def within(low: int, high: int) -> tuple[slice, np.ndarray]:
        low, high = (min(max(0, int(end)), stop) for end in (low, high))
        return slice(low, high), np.arange(low, high)[None]

    if causal:
        part, index = within(anchor[0, 0], stop)
        yield index > anchor, part
    if window is not None:
        part, index = within(0, anchor[-1, 0] - window + 1)
        yield anchor - index >= window, part
        part, index = within(anchor[0, 0] + window, stop)
        yield index - anchor >= window, part


def _padded(key: np.ndarray, cell: int) -> np.ndarray:
    return np.pad(key, ((0, -len(key) % cell), (0, 0)))


def _capped(s: np.ndarray, cap: float | None) -> np.ndarray:
    return s if cap is None else cap * np.tanh(s / cap)


def _log_rest(log_first: np.ndarray) -> np.ndarray:
    """`log(1 - p_i0)`; infinity, which hides the row, where it sees nothing else."""
    rest = 1.0 - np.exp(np.minimum(log_first, 0.0))
    return np.where(rest > 1e-9, np.log(np.maximum(rest, 1e-9)), np.inf)
