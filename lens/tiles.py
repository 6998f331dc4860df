"""Exact probabilities of any rectangle of a stored head, and when they cannot be had.

`P[i, j] = exp(s_ij - lse_i)` needs nothing but q, k and LSE of the rectangle's rows and keys. A trace
keeps neither additive biases (ALiBi, T5) nor masks that are no window, so two rows of a head are
recomputed and held against what was measured; a head that fails is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lens.trace import AttentionTrace

_TOLERANCE = 1e-2


def exact_tile(
    trace: AttentionTrace,
    layer: int,
    head: int,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> np.ndarray:
    """[queries, keys] float64 probabilities; only the rectangle's q, k and LSE are read."""
    from lens_kernels import tile

    rows, columns = slice(*queries), slice(*keys)
    kv_head = head // (trace.heads // trace.dataset.sizes["kv_head"])
    position = _position(trace, layer)
    return tile(
        _read(trace, "q", layer=position, head=head, query=rows),
        _read(trace, "k", layer=position, kv_head=kv_head, key=columns),
        _read(trace, "lse", layer=position, head=head, query=rows),
        query_range=(0, queries[1] - queries[0]),
        key_range=(0, keys[1] - keys[0]),
        scale=trace.attrs["scale"][position],
        softcap=trace.attrs["softcap"],
        causal=trace.attrs["causal"],
        window=trace.attrs["windows"][position],
        offset=queries[0] - keys[0],
    )


def _position(trace: AttentionTrace, layer: int) -> int:
    return trace.dataset["layer"].values.tolist().index(layer)


def _read(trace: AttentionTrace, name: str, **where: int | slice) -> np.ndarray:
    """Part of one variable as float64; of `Dataset.isel` most time would go to the others."""
    return trace.dataset.variables[name].isel(where).values.astype(np.float64)


def refusal(trace: AttentionTrace, layer: int, head: int) -> str:
    """Why a head has no exact tiles, with the remedy; empty if it has."""
    if not {"q", "k", "lse"} <= set(trace.dataset):
        return (
            "exact tiles need q, k and lse, which this trace did not keep; "
            "capture it again with keep_qk=True (lens run --keep-qk)"
        )
    if not trace.has_plain_mask(layer):
        return (
            f"layer {layer} of {trace.model} has a mask that is neither causal nor a window, which a "
            "trace does not keep, so there are no exact tiles; use block_mass"
        )
    for query in {trace.length // 2, trace.length - 1}:
        if not _gives_back(trace, layer, head, query):
            return (
                f"q and k of L{layer}H{head} of {trace.model} do not give back what was measured (a "
                "position bias, perhaps), so there are no exact tiles; use block_mass"
            )
    return ""


def _gives_back(trace: AttentionTrace, layer: int, head: int, query: int) -> bool:
    """Whether a recomputed row has the measured largest probability, first key and sum."""
    row = exact_tile(trace, layer, head, (query, query + 1), (0, trace.length))[0]
    at = {"layer": _position(trace, layer), "head": head, "query": query}
    pairs = []
    if not trace.attrs.get("learned_sinks", False):
        pairs.append((row.sum(), 1.0))
    if "max_logit" in trace.dataset:
        largest = np.exp(_read(trace, "max_logit", **at) - _read(trace, "lse", **at))
        pairs.append((row.max(), float(largest)))
    if "first_mass" in trace.dataset:
        pairs.append((row[0], float(_read(trace, "first_mass", **at))))
    return all(abs(found - known) <= _TOLERANCE * max(known, 1e-3) for found, known in pairs)
