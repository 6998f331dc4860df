"""Exact probabilities of any rectangle of a stored head, and when they cannot be had.

`P[i, j] = exp(s_ij - lse_i)` needs nothing but q, k and LSE of the rectangle's rows and keys. A trace
keeps no additive biases (ALiBi, T5), and of masks only those by which a query sees keys without a gap, so two rows of a head are
recomputed and held against what was measured; a head that fails is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from lens_kernels import tile

from lens.common.head_ids import HeadId

_TOLERANCE = 1e-2


def exact_tile(
    dataset: xr.Dataset,
    head: HeadId,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> np.ndarray:
    """[queries, keys] float64 probabilities; only the rectangle's q, k and LSE are read."""
    rows, columns = slice(*queries), slice(*keys)
    layer, number = head
    kv_head = number // (dataset.sizes["head"] // dataset.sizes["kv_head"])
    position = position_of(dataset, layer)
    ranges = seen_ranges(dataset.attrs, position)
    mask: dict[str, Any] = {
        "causal": dataset.attrs["causal"],
        "window": dataset.attrs["windows"][position],
    }
    if ranges is not None:
        first, past = ranges[:, rows, None]
        places = np.arange(*keys)
        mask = {"allowed": (first <= places) & (places < past)}
    found = tile(
        read(dataset, "q", layer=position, head=number, query=rows),
        read(dataset, "k", layer=position, kv_head=kv_head, key=columns),
        read(dataset, "lse", layer=position, head=number, query=rows),
        query_range=(0, queries[1] - queries[0]),
        key_range=(0, keys[1] - keys[0]),
        scale=dataset.attrs["scale"][position],
        softcap=dataset.attrs["softcap"],
        **mask,
        offset=queries[0] - keys[0],
    )
    seen = dataset.variables["visible"].isel(layer=position, key=columns).values > 0
    return np.where(seen, found, 0.0)


def seen_ranges(attributes: Mapping[str, Any], position: int) -> np.ndarray | None:
    """[2, queries] of the layer at a position: first key that a query sees and one past its last; None where a trace
    does not note it."""
    if (noted := attributes.get("seen")) is None or (number := noted["of"][position]) is None:
        return None
    return np.array(noted["ranges"][number])


def position_of(dataset: xr.Dataset, layer: int) -> int:
    """Where a layer stands among those of a trace."""
    return dataset["layer"].values.tolist().index(layer)


def read(
    dataset: xr.Dataset, name: str, dtype: type = np.float64, **where: int | slice | np.ndarray
) -> np.ndarray:
    """Part of one variable; of `Dataset.isel` most time would go to the others."""
    return dataset.variables[name].isel(where).values.astype(dtype)


def refusal(dataset: xr.Dataset, head: HeadId) -> str:
    """Why a head whose mask is plain has no exact tiles, with the remedy; empty if it has."""
    if not {"q", "k", "lse"} <= set(dataset):
        return (
            "exact tiles need q, k and lse, which this trace did not keep; "
            "capture it again with keep_qk=True (lens run --keep-qk)"
        )
    rows = dataset.sizes["query"]
    for query in {rows // 2, rows - 1}:
        if not _gives_back(dataset, head, query):
            return (
                f"q and k of {head} of {dataset.attrs['model']} do not give back what was measured (a "
                "position bias, perhaps), so there are no exact tiles; use block_mass"
            )
    return ""


def _gives_back(dataset: xr.Dataset, head: HeadId, query: int) -> bool:
    """Whether a recomputed row has the measured largest probability, first key and sum."""
    row = exact_tile(dataset, head, (query, query + 1), (0, dataset.sizes["key"]))[0]
    at: dict[str, Any] = {
        "layer": position_of(dataset, head.layer),
        "head": head.head,
        "query": query,
    }
    pairs = []
    if not dataset.attrs.get("learned_sinks", False):
        pairs.append((row.sum(), 1.0))
    if "max_logit" in dataset:
        largest = np.exp(read(dataset, "max_logit", **at) - read(dataset, "lse", **at))
        pairs.append((row.max(), float(largest)))
    if "first_mass" in dataset:
        pairs.append((row[0], float(read(dataset, "first_mass", **at))))
    return all(abs(found - known) <= _TOLERANCE * max(known, 1e-3) for found, known in pairs)
