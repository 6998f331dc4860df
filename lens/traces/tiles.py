"""Exact probabilities of any rectangle of a stored head, and when they cannot be had.

`P[i, j] = exp(s_ij - lse_i)` needs nothing but q, k and LSE of the rectangle's rows and keys. Of additive biases a trace
keeps those of windows of a picture (Swin), not ALiBi and T5, and of masks those by which a query sees keys without a gap or
all of a window, so two rows of a head are recomputed and held against what was measured; a head that fails is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from lens_kernels import tile

from lens.common.head_ids import HeadId

_TOLERANCE = 1e-2
_arrays: deque[tuple[Any, np.ndarray]] = deque(maxlen=8)


def key_head(dataset: xr.Dataset, head: int) -> int:
    """Which of the heads of k a head reads."""
    return head // (dataset.sizes["head"] // dataset.sizes["kv_head"])


def of_head(dataset: xr.Dataset, head: HeadId) -> xr.Dataset:
    """Every variable of one head, with the k that it reads."""
    found = dataset.sel(layer=head.layer, head=head.head)
    return found.isel(kv_head=key_head(dataset, head.head)) if "kv_head" in dataset.sizes else found


def exact_tile(
    dataset: xr.Dataset,
    head: HeadId,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> np.ndarray:
    """[queries, keys] float64 probabilities; only the rectangle's q, k and LSE are read."""
    rows, columns = slice(*queries), slice(*keys)
    layer, number = head
    kv_head = key_head(dataset, number)
    position = position_of(dataset, layer)
    at, places = np.arange(*queries), np.arange(*keys)
    if (allowed := noted_mask(dataset.attrs, position, at, places)) is not None:
        mask: dict[str, Any] = {"allowed": allowed}
    else:
        mask = {
            "causal": dataset.attrs["causal"],
            "window": dataset.attrs["windows"][position],
        }
    found = tile(
        read(dataset, "q", layer=position, head=number, query=rows),
        read(dataset, "k", layer=position, kv_head=kv_head, key=columns),
        read(dataset, "lse", layer=position, head=number, query=rows),
        query_range=(0, queries[1] - queries[0]),
        key_range=(0, keys[1] - keys[0]),
        scale=dataset.attrs["scale"][position],
        softcap=dataset.attrs["softcap"],
        bias=noted_bias(dataset, head, at, places),
        **mask,
        offset=queries[0] - keys[0],
    )
    seen = dataset.variables["visible"].isel(layer=position, key=columns).values > 0
    return np.where(seen, found, 0.0)


def noted_mask(
    attributes: Mapping[str, Any], position: int, queries: np.ndarray, keys: np.ndarray
) -> np.ndarray | None:
    """bool [queries, keys] of the layer at a position, which of these keys these queries see; None where `causal` and its
    window say it, or the trace does not note it."""
    if (ranges := _noted(attributes, "seen", "ranges", position)) is not None:
        first, past = ranges[:, queries, None]
        return (first <= keys) & (keys < past)
    if (parts := _noted(attributes, "partition", "parts", position)) is not None:
        return (parts[queries, None] == parts[keys]) & (parts[keys] >= 0)
    return None


def notes_mask(attributes: Mapping[str, Any], position: int) -> bool:
    """Whether a trace notes who sees whom in the layer at a position."""
    none = np.arange(0)
    return noted_mask(attributes, position, none, none) is not None


def sees(dataset: xr.Dataset, layer: int, queries: tuple[int, int]) -> np.ndarray:
    """bool [queries, keys]: which keys these queries see in a layer whose tiles are exact."""
    position, length = position_of(dataset, layer), dataset.sizes["key"]
    at, keys = np.arange(*queries), np.arange(length)
    found = noted_mask(dataset.attrs, position, at, keys)
    if found is None:
        behind = at[:, None] - keys
        window = dataset.attrs["windows"][position] or max(length, dataset.sizes["query"])
        found = (behind >= 0 if dataset.attrs["causal"] else True) & (np.abs(behind) < window)
    return found & (read(dataset, "visible", layer=position) > 0)


def mask_number(dataset: xr.Dataset, layer: int) -> tuple[Any, ...]:
    """The same for layers of a trace whose queries see the same keys."""
    position = position_of(dataset, layer)
    noted = (dataset.attrs.get(name) for name in ("seen", "partition"))
    visible = read(dataset, "visible", layer=position)
    return (
        dataset.attrs["windows"][position],
        *(None if one is None else one["of"][position] for one in noted),
        (visible > 0).tobytes(),
    )


def _noted(attributes: Mapping[str, Any], name: str, each: str, position: int) -> np.ndarray | None:
    if (noted := attributes.get(name)) is None or (number := noted["of"][position]) is None:
        return None
    return _array(noted[each][number])


def _array(given: Any) -> np.ndarray:
    """A list of attributes; kept, since whole rows are asked for strip by strip."""
    for known, array in tuple(_arrays):
        if known is given:
            return array
    _arrays.append((given, array := np.array(given)))
    return array


def noted_bias(
    dataset: xr.Dataset, head: HeadId, queries: np.ndarray, keys: np.ndarray
) -> np.ndarray | None:
    """[queries, keys] what the head adds to these logits, 0 between cells that do not see each other; None: nothing."""
    if "bias" not in dataset:
        return None
    table = read(dataset, "bias", layer=position_of(dataset, head.layer), head=head.head)
    cells = _array(dataset.attrs["cells"])
    down, across = np.moveaxis(cells[queries, None] - cells[keys], -1, 0)
    height, width = table.shape
    return np.nan_to_num(table[down + height // 2, across + width // 2])


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
    if "bias" in dataset:
        table = read(dataset, "bias", layer=position_of(dataset, head.layer), head=head.head)
        if np.isnan(table).all():
            return (
                f"{head} of {dataset.attrs['model']} adds a position bias that depends on more than how far apart two "
                "patches are, which a trace does not keep, so there are no exact tiles; use block_mass"
            )
    if not gives_back(dataset, head):
        return (
            f"q and k of {head} of {dataset.attrs['model']} do not give back what was measured (a "
            "position bias, perhaps), so there are no exact tiles; use block_mass"
        )
    return ""


def gives_back(dataset: xr.Dataset, head: HeadId) -> bool:
    """Whether q and k of a head, whose mask is noted, give back what was measured of two rows that see a key."""
    lse = read(dataset, "lse", layer=position_of(dataset, head.layer), head=head.head)
    rows = np.flatnonzero(np.isfinite(lse)).tolist()
    return all(_gives_back(dataset, head, row) for row in {*rows[len(rows) // 2 :][:1], *rows[-1:]})


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
