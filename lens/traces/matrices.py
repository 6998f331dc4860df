"""The statistics of a trace, from probability matrices that somebody else built.

They are computed from what was given, in float64, one head in memory at a time. What needs the logits
(`lse`, `max_logit`) or q and k is absent.
"""

from collections.abc import Sequence

import numpy as np

from lens.traces.labels import PREFIX


def layer_variables(
    matrices: np.ndarray, ids: Sequence[int] | None, block_size: int, *, causal: bool
) -> dict[str, np.ndarray]:
    """Name -> float32 array with the dimensions of a trace, from [heads, n, n] probabilities."""
    of_heads = [
        _head_variables(matrix.astype(np.float64), ids, block_size, causal) for matrix in matrices
    ]
    return {
        name: np.stack([one[name] for one in of_heads]).astype(np.float32) for name in of_heads[0]
    }


def _head_variables(
    p: np.ndarray, ids: Sequence[int] | None, block_size: int, causal: bool
) -> dict[str, np.ndarray]:
    length = len(p)
    position = np.arange(length)
    distance = position[:, None] - position
    starts = np.arange(0, length, block_size)
    rows = np.diff(np.append(starts, length))
    rest = p[:, 1:]
    rest_mass = rest.sum(1)
    without = np.divide(
        rest,
        rest_mass[:, None],
        out=np.full_like(rest, np.nan),
        where=rest_mass[:, None] > 0,
    )
    first = 0 if causal else 1 - length
    offsets = (distance - first).ravel()
    kept = offsets >= 0
    in_columns = np.add.reduceat(p, starts, axis=1)
    return {
        "entropy": _entropy(p),
        "entropy_sink_excluded": _entropy(without),
        "concentration": (p**2).sum(1),
        "distance": (p * distance).sum(1),
        "distance_sink_excluded": np.where(
            rest_mass > 0, (without * distance[:, 1:]).sum(1), np.nan
        ),
        "prefix_mass": p[:, :PREFIX].sum(1),
        "first_mass": p[:, 0],
        "rest_mass": rest_mass,
        "match_mass": _matches(p, ids, distance, causal),
        "received": p.sum(0),
        "diagonal": np.bincount(offsets[kept], p.ravel()[kept], minlength=length - first),
        "block_mass": np.add.reduceat(in_columns, starts, axis=0) / rows[:, None],
        "block_max": np.maximum.reduceat(np.maximum.reduceat(p, starts, axis=1), starts, axis=0),
    }


def _entropy(p: np.ndarray) -> np.ndarray:
    """[rows]; a row of NaN stays NaN, a row without keys too."""
    if not p.shape[1]:
        return np.full(len(p), np.nan)
    return -(p * np.log(np.where(p == 0, 1, p))).sum(1)


def _matches(
    p: np.ndarray, ids: Sequence[int] | None, distance: np.ndarray, causal: bool
) -> np.ndarray:
    """[rows, rules] in the order of `MATCH_RULES`, NaN for the rules that cannot be had."""
    nothing = np.full(len(p), np.nan)
    masses = [(p * (distance == 0)).sum(1), (p * (distance == 1)).sum(1)]
    if ids is None:
        return np.stack([*masses, nothing, nothing], 1)
    own = np.asarray(ids)
    before = np.append(-1, own[:-1])
    masses.append((p * (own[:, None] == own)).sum(1))
    masses.append((p * (own[:, None] == before)).sum(1) if causal else nothing)
    return np.stack(masses, 1)
