"""The largest or the mean exact probability in each cell of a picture, from q, k and LSE, at any zoom into any length.

`max exp(s_ij - lse_i)` over the queries and keys of a cell is `exp(max(s_ij - lse_i))`: one product of matrices and
maxima, strip by strip, and an exponential of each cell alone. A mean takes one of each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import xarray as xr

from lens.common.head_ids import HeadId
from lens.traces.tiles import key_head, noted_bias, noted_mask, notes_mask, position_of, read

_STRIP = 128  # queries of which scores are held at once

Pooling = Literal["max", "mean"]


def pooled(
    dataset: xr.Dataset,
    head: HeadId,
    queries: tuple[int, int],
    keys: tuple[int, int],
    cell: int,
    *,
    pooling: Pooling = "max",
    rows: int | None = None,
    without_first: bool = False,
) -> np.ndarray:
    """[cells, cells] float32, one probability for each cell of so many tokens a side.

    Args:
        dataset: of a trace whose tiles are exact.
        head: which.
        queries, keys: ranges (first, past the last).
        cell: tokens a side; the last cells may have fewer.
        pooling: the largest of a cell, or the mean of its pairs whose key is not after the query of a causal model.
        rows: queries of each cell that are looked at, spread evenly; all of them if None.
        without_first: key 0 is left out, and each row is divided by what is left.
    """
    layer, number = position_of(dataset, head.layer), head.head
    kv_head = key_head(dataset, number)
    first, last = keys
    key = _padded(
        read(dataset, "k", np.float32, layer=layer, kv_head=kv_head, key=slice(*keys)), cell
    )
    seen = np.zeros(len(key), dtype=bool)
    seen[: last - first] = read(dataset, "visible", layer=layer, key=slice(*keys)) > 0
    if without_first and first == 0:
        seen[0] = False
    blind = np.flatnonzero(~seen)
    scale, cap = dataset.attrs["scale"][layer], dataset.attrs["softcap"]
    is_causal, window = dataset.attrs["causal"], dataset.attrs["windows"][layer]
    noted = notes_mask(dataset.attrs, layer)
    causal = is_causal and not noted
    window = None if noted else window
    part = slice(*queries)
    query = read(dataset, "q", layer=layer, head=number, query=part) * scale
    lse = read(dataset, "lse", layer=layer, head=number, query=part)
    if without_first:
        first_key = read(dataset, "k", layer=layer, kv_head=kv_head, key=slice(0, 1))
        first_logit = _capped(query @ first_key.T, cap)
        first_logit = _noted(dataset, head, first_logit, np.arange(*queries), np.arange(1))
        lse = lse + _log_rest(first_logit[:, 0] - lse)
    query, lse = query.astype(np.float32), lse.astype(np.float32)
    found = np.zeros((-(-len(query) // cell), len(key) // cell), np.float32)
    for start, at, each in _strips(queries, cell, min(rows or cell, cell)):
        stop = len(key) if not causal else min(len(key), -(-(at[-1] + 1 - first) // cell) * cell)
        if stop <= 0:
            continue
        looked = at - queries[0]
        there = np.arange(first, min(first + stop, last))  # the rest of the last cell is blind
        s = _noted(dataset, head, _capped(query[looked] @ key[:stop].T, cap), at, there)
        s -= lse[looked, None]
        for hidden, within in _hidden(at, first, stop, causal, window):
            s[:, within][hidden] = -np.inf
        s[:, blind[blind < stop]] = -np.inf
        if pooling == "max":
            s = np.exp(_over(np.maximum, s, each).reshape(-1, stop // cell, cell).max(2))
        else:
            s = _over(np.add, np.exp(s, out=s), each).reshape(-1, stop // cell, cell).sum(2)
            counted = np.isfinite(lse[looked]) if without_first else np.ones(len(at), bool)
            edges = np.arange(0, stop + 1, cell) + first
            pairs = _keys_before(edges, at, keys, is_causal, without_first) * counted[:, None]
            s /= np.maximum(_over(np.add, pairs, each), 1)
        top = (start - queries[0]) // cell
        found[top : top + len(s), : s.shape[1]] = s
    return found


def _keys_before(
    edges: np.ndarray, at: np.ndarray, keys: tuple[int, int], causal: bool, without_first: bool
) -> np.ndarray:
    """[queries, cells] how many keys of a cell a query could see, of cells between such edges."""
    most = np.minimum(at + 1, keys[1])[:, None] if causal else np.full((len(at), 1), keys[1])
    low = np.maximum(edges[:-1], 1) if without_first else edges[:-1]
    return np.maximum(np.minimum(edges[1:], most) - low, 0)


def _over(how: np.ufunc, values: np.ndarray, size: int) -> np.ndarray:
    """Rows, so many at a time, as one; the last ones may be fewer."""
    whole = len(values) // size * size
    found = how.reduce(values[:whole].reshape(-1, size, values.shape[1]), axis=1)
    if whole == len(values):
        return found
    return np.concatenate([found, how.reduce(values[whole:], axis=0, keepdims=True)])


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


def _noted(
    dataset: xr.Dataset, head: HeadId, logits: np.ndarray, queries: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Logits of these keys and of padding behind them, with the bias and mask that the trace notes."""
    own = logits[:, : len(keys)]
    if (bias := noted_bias(dataset, head, queries, keys)) is not None:
        own += bias
    position = position_of(dataset, head.layer)
    if (allowed := noted_mask(dataset.attrs, position, queries, keys)) is not None:
        own[~allowed] = -np.inf
    return logits


def _padded(key: np.ndarray, cell: int) -> np.ndarray:
    return np.pad(key, ((0, -len(key) % cell), (0, 0)))


def _capped(s: np.ndarray, cap: float | None) -> np.ndarray:
    return s if cap is None else cap * np.tanh(s / cap)


def _log_rest(log_first: np.ndarray) -> np.ndarray:
    """`log(1 - p_i0)`; infinity, which hides the row, where it sees nothing else."""
    rest = 1.0 - np.exp(np.minimum(log_first, 0.0))
    return np.where(rest > 1e-9, np.log(np.maximum(rest, 1e-9)), np.inf)
