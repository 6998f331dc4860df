"""Exact probabilities of one rectangle, from q, k and LSE: any zoom into any length.

`P[i, j] = exp(s_ij - lse_i)`, so a tile needs no row but its own queries and no key but its own
keys: a viewer browses a head of 128k tokens like a map. Only the rows and keys of the rectangle are
read (memory-mapped arrays stay on disk). numpy is enough; torch tensors give a torch tensor.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lens_kernels.arguments import as_number, check_kinds

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Array = TypeVar("Array", bound=Any)
"""`numpy.ndarray` or `torch.Tensor`; all arguments of one call are of the same kind."""


def tile(
    query: Float[Array, "*heads queries head_dim"],
    key: Float[Array, "*kv_heads keys head_dim"],
    lse: Float[Array, "*heads queries"],
    query_range: tuple[int, int],
    key_range: tuple[int, int],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
    prefix: int | None = None,
    key_start: int = 0,
    key_end: int | None = None,
    offset: int | None = None,
    alibi_slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "... #keys"] | None = None,
    allowed: Bool[Array, "... #keys"] | None = None,
) -> Float[Array, "*heads rows columns"]:
    """The exact probabilities of queries `query_range` on keys `key_range`.

    The mask means what it means in `AttentionMask`. Batch rows that are padded differently take one
    call each, packed sequences one call per sequence (slice q, k and LSE).

    Args:
        query: [..., heads, queries, head_dim], or [queries, head_dim] for one head.
        key: [..., kv_heads, keys, head_dim]; heads is a multiple of kv_heads (GQA).
        lse: [..., heads, queries], natural log-sum-exp of the whole rows, learned sink included,
            as `attention` returns it.
        query_range: (first, one past the last) query.
        key_range: (first, one past the last) key.
        scale: factor of the logits; None: 1 / sqrt(head_dim).
        softcap: `s = softcap * tanh(s / softcap)`.
        causal: key `j` is visible when `j <= anchor`.
        window: key `j` is visible when `anchor - j < window`, both ways without `causal`.
        prefix: the first `prefix` keys from `key_start` on are visible in spite of `causal`.
        key_start: keys before this index are padding.
        key_end: keys from this index on are padding; None: no key is.
        offset: query `i` stands at key `anchor = i + offset`; None: `keys - queries`.
        alibi_slopes: [heads], adds `-slope * |anchor - j|`.
        bias: broadcastable to [..., heads, queries, keys], added to the logits.
        allowed: bool, broadcastable likewise, False hides the key.

    Returns:
        [..., heads, rows, columns]; float64 when an input is float64, else float32. Rows whose LSE
        is -inf are 0.

    Raises:
        ValueError: shapes that do not fit, a range outside the arrays, a window below 1.

    Example:
        >>> q = k = np.zeros((6, 2), dtype=np.float32)
        >>> lse = np.log(np.arange(1, 7, dtype=np.float32))
        >>> tile(q, k, lse, (3, 5), (0, 5), causal=True).round(3).astype(str).tolist()
        [['0.25', '0.25', '0.25', '0.25', '0.0'], ['0.2', '0.2', '0.2', '0.2', '0.2']]
    """
    arrays = {"query": query, "key": key, "lse": lse}
    for name, one in {
        **arrays,
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "allowed": allowed,
    }.items():
        if not hasattr(one, "ndim") and (name in arrays or one is not None):
            raise TypeError(f"{name} must be an array of numpy or torch, got {type(one).__name__}")
    check_kinds(bool, causal=causal)
    check_kinds(
        (int, np.integer),
        window=window,
        prefix=prefix,
        key_start=key_start,
        key_end=key_end,
        offset=offset,
    )
    check_kinds((list, tuple, range), query_range=query_range, key_range=key_range)
    scale = None if scale is None else as_number("scale", scale)
    softcap = None if softcap is None else as_number("softcap", softcap)
    _check_shapes(query, key, lse)
    queries, keys = query.shape[-2], key.shape[-2]
    if not all(np.isfinite(one) for one in (scale, softcap) if one is not None):
        raise ValueError(f"scale and softcap must be finite, got {scale} and {softcap}")
    if offset is not None and not abs(offset) < 2**31:
        raise ValueError(f"offset must be below 2**31, got {offset}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query's own key), got {window}")
    longest = 2 * (queries + keys + abs(offset or 0))  # no distance and no key is beyond it
    window = None if window is None else min(window, longest)
    prefix = None if prefix is None else min(prefix, longest)
    rows = _range("query_range", query_range, queries)
    columns = _range("key_range", key_range, keys)
    xp = _module(query)
    wide = xp.float64 if xp.float64 in (query.dtype, key.dtype, lse.dtype) else xp.float32

    s = _products(_cast(query[..., rows, :], wide), _cast(key[..., columns, :], wide))
    s = s * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * xp.tanh(s / softcap)
    if bias is not None:
        s = s + _cast(_rectangle(bias, rows, columns), wide)
    place = {} if xp is np else {"device": query.device}
    shift = keys - queries if offset is None else offset
    anchor = xp.arange(rows.start, rows.stop, **place)[:, None] + shift
    index = xp.arange(columns.start, columns.stop, **place)[None]
    if alibi_slopes is not None:
        distance = _cast(abs(anchor - index), wide)
        s = s - _cast(alibi_slopes, wide)[:, None, None] * distance

    visible = (index >= key_start) & (index < (keys if key_end is None else key_end))
    if causal:
        reach = index <= anchor
        if prefix is not None:
            reach = reach | (index < key_start + prefix)
        visible = visible & reach
    if window is not None:
        visible = visible & (anchor - index < window) & (index - anchor < window)
    if allowed is not None:
        visible = visible & _rectangle(allowed, rows, columns)
    total = _cast(lse[..., rows], wide)[..., None]
    seen = total > -np.inf
    logit = xp.where(visible & seen, s, -np.inf)
    return xp.exp(logit - xp.where(seen, total, 0.0))


def _module(array: Any) -> Any:
    """numpy or torch, whichever made the array; torch is never imported here."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def _cast(array: Any, dtype: Any) -> Any:
    return array.astype(dtype) if isinstance(array, np.ndarray) else array.to(dtype)


def _products(query: Any, key: Any) -> Any:
    """`q.k` [..., heads, rows, columns]; the heads of a group share a key head."""
    turned = key.swapaxes(-1, -2)
    if query.ndim == 2 or query.shape[-3] == key.shape[-3]:
        return query @ turned
    *lead, heads, rows, dim = query.shape
    kv_heads = key.shape[-3]
    grouped = query.reshape(*lead, kv_heads, heads // kv_heads * rows, dim)
    return (grouped @ turned).reshape(*lead, heads, rows, key.shape[-2])


def _rectangle(array: Any, rows: slice, columns: slice) -> Any:
    """The tile's part of an array broadcastable to [..., heads, queries, keys]."""
    if array.shape[-1] != 1:
        array = array[..., columns]
    if array.ndim > 1 and array.shape[-2] != 1:
        array = array[..., rows, :]
    return array


def _range(name: str, given: tuple[int, int], size: int) -> slice:
    first, last = given if len(given) == 2 else (0, 0)
    if not 0 <= first < last <= size:
        raise ValueError(
            f"{name} must be (first, one past the last) within 0..{size}, got {tuple(given)}"
        )
    return slice(first, last)


def _check_shapes(query: Any, key: Any, lse: Any) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, lse {list(lse.shape)}"
    if query.ndim < 2 or key.ndim != query.ndim or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            "query must be [..., heads, queries, head_dim] and key [..., kv_heads, keys, head_dim] "
            f"with equal head_dim and number of axes, got {shapes}"
        )
    if lse.shape != query.shape[:-1]:
        raise ValueError(f"lse must be of the query's shape without head_dim, got {shapes}")
    if query.ndim > 2 and query.shape[-3] % key.shape[-3]:
        raise ValueError(f"heads must be a multiple of kv_heads, got {shapes}")
