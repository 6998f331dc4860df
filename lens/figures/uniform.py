"""What attention would be if every query spread it evenly over the keys that it sees."""

import numpy as np

from lens.traces.uniform import visible_queries


def keys_seen(length: int, *, causal: bool, window: int | None) -> np.ndarray:
    """[queries] how many keys each query sees."""
    return visible_queries(length, causal=causal, window=window)[::-1]


def received(length: int, *, causal: bool, window: int | None) -> np.ndarray:
    """[keys] mean mass that each key receives from the queries that see it."""
    share = _running_sum(1 / keys_seen(length, causal=causal, window=window))
    reach = length if window is None else window
    key = np.arange(length)
    first = key if causal else np.maximum(key - reach + 1, 0)
    past = np.minimum(key + reach, length)
    return (share[past] - share[first]) / (past - first)


def by_distance(offset: np.ndarray, length: int, *, causal: bool, window: int | None) -> np.ndarray:
    """[offsets] mean mass at each distance `query - key`, over the queries that have such a key.

    `offset` must lie within what the mask lets a query see.
    """
    share = _running_sum(1 / keys_seen(length, causal=causal, window=window))
    first, past = np.maximum(offset, 0), length + np.minimum(offset, 0)
    return (share[past] - share[first]) / (past - first)


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Sum of the values before each position; one longer than `values`."""
    return np.concatenate([[0.0], np.cumsum(values)])
