"""The arrays of a trace with their coordinates (docs/schema/trace.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lens.traces.labels import MATCH_RULES
from lens.traces.uniform import visible_queries


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
