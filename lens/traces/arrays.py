"""The arrays of a trace with their coordinates (docs/schema/trace.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lens.traces.labels import MATCH_RULES
from lens.traces.uniform import visible_queries


class LayerArrays:
    """Arrays of layers, taken one layer after the other: [layers, ...], with room for those that are expected.

    A layer is copied when it comes, so that its own memory serves the next one.
    """

    def __init__(self, expected: int) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self._expected, self._count = max(1, expected), 0

    def add(self, variables: Mapping[str, np.ndarray]) -> None:
        """Take the next layer; every layer has the same names and shapes."""
        count = self._count
        for name, array in variables.items():
            held = self._arrays.get(name)
            kind = array.dtype if held is None else np.result_type(held, array)
            is_full = held is None or count == len(held)
            if held is None or is_full or kind != held.dtype:
                room = max(2 * count, self._expected) if held is None or is_full else len(held)
                wider = np.empty((room, *array.shape), kind)
                if held is not None:
                    wider[:count] = held[:count]
                held = self._arrays[name] = wider
            held[count] = array
        self._count += 1

    def in_order(self, places: list[int]) -> dict[str, np.ndarray]:
        """The layers that came at these places; not copied if these are all, in the order in which they came."""
        chosen = slice(self._count) if places == list(range(self._count)) else places
        return {name: array[chosen] for name, array in self._arrays.items()}


def labelled(
    variables: Mapping[str, xr.Variable],
    layers: Sequence[int],
    coordinates: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """A dataset of these variables: dimensions named, coordinates added."""
    variables = dict(variables)
    length, block = len(coordinates["token"]), attributes["block_size"]
    causal = attributes["causal"]
    tokens = np.array(coordinates["token"], dtype=object)  # str_ would drop a trailing NUL
    ids = np.array(coordinates["token_id"], dtype=np.int64)
    rows, row_ids = tokens, ids
    if coordinates.get("query_token") is not None:
        rows = np.array(coordinates["query_token"], dtype=object)
        row_ids = np.array(coordinates["query_token_id"], dtype=np.int64)
    starts, row_starts = np.arange(0, length, block), np.arange(0, len(rows), block)
    if "visible" not in variables:
        counts = [
            visible_queries(length, causal=causal, window=attributes["windows"][index])
            for index in range(len(layers))
        ]
        variables["visible"] = xr.Variable(("layer", "key"), np.stack(counts))
    sizes = {
        dimension: size
        for variable in variables.values()
        for dimension, size in zip(variable.dims, variable.shape, strict=True)
    }
    coords: dict[str, Any] = {
        "layer": list(layers),
        "head": np.arange(sizes.get("head", 0)),
        "query": np.arange(len(rows)),
        "key": np.arange(length),
        "query_block": np.arange(len(row_starts)),
        "key_block": np.arange(len(starts)),
        "query_token": ("query", rows),
        "key_token": ("key", tokens),
        "token_id": ("key", ids),
        "query_block_start": ("query_block", row_starts),
        "key_block_start": ("key_block", starts),
        "match": [*MATCH_RULES, *attributes.get("labels", {})],
        "offset": np.arange(0 if causal else 1 - length, length),
    }
    if rows is not tokens:
        coords["query_token_id"] = ("query", row_ids)
    if "kv_head" in sizes:
        coords["kv_head"] = np.arange(sizes["kv_head"])
    used = {"query", "key", *sizes}
    kept = {
        name: value
        for name, value in coords.items()
        if (value[0] if isinstance(value, tuple) else name) in used
    }
    return xr.Dataset(variables, coords=kept, attrs=dict(attributes))


def block_rows(data: xr.Dataset | xr.DataArray, queries: int) -> np.ndarray:
    """[query_block] how many of so many rows each block of a map has."""
    return np.diff([*data["query_block_start"].values, queries])
