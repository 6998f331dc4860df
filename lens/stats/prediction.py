"""Where the mean of more units like those that were seen should lie."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from lens.common.errors import LensError
from lens.stats.intervals import LEVEL


def prediction(values: ArrayLike, more: int | None = None) -> tuple[float, float]:
    """Between which the mean of `more` other units, drawn like these, lies with probability `LEVEL`.

        mean +- t[n - 1] s sqrt(1 / n + 1 / more)

    exact for normal values; wider than the interval of the mean, which says nothing about other units.

    Args:
        values: [n], of independent units such as prompts.
        more: number of the others; None: as many.

    Returns:
        Low and high end; NaN for a single unit, which tells nothing of others.

    Raises:
        LensError: no values, or fewer than one other unit.

    Reference: Hahn and Meeker, Statistical Intervals, 1991, section 4.8.

    Example:
        >>> [round(end, 2) for end in lens.stats.prediction.prediction([1.0, 2.0, 3.0])]
        [-1.51, 5.51]
    """
    found = np.asarray(values, float).ravel()
    others = len(found) if more is None else more
    if not len(found) or others < 1:
        raise LensError(f"a prediction needs units and others, got {len(found)} and {others}")
    if len(found) == 1:
        return math.nan, math.nan
    spread = found.std(ddof=1) * math.sqrt(1 / len(found) + 1 / others)
    half = float(stdtrit(len(found) - 1, (1 + LEVEL) / 2) * spread)
    return float(found.mean()) - half, float(found.mean()) + half
