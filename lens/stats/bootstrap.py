"""95 % percentile bootstrap intervals of means, for many heads at a time."""

from functools import lru_cache

import numpy as np

RESAMPLES = 1000
_ENDS = (2.5, 97.5)


def over_units(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Interval of `sum(sums) / sum(counts)` when whole units (such as prompts) are drawn again.

    Args:
        sums, counts: [units, ...] of each unit.
        seed: of the draws.

    Returns:
        Low and high end, [...] each; NaN where fewer than two units have a count.
    """
    units, shape = len(sums), sums.shape[1:]
    sums, counts = sums.reshape(units, -1), counts.reshape(units, -1).astype(float)
    draws = _draws(units, seed)
    few = (counts > 0).sum(0) < 2
    total = draws @ np.where(few, 1, counts)
    drawn = total > 0  # a resample may miss every unit that has a count
    means = np.where(drawn, draws @ sums / np.where(drawn, total, 1), np.nan)
    percentile = np.percentile if drawn.all() else np.nanpercentile  # the second is slow
    low, high = np.where(few, np.nan, percentile(means, _ENDS, axis=0))
    return low.reshape(shape), high.reshape(shape)


@lru_cache(maxsize=8)
def _draws(units: int, seed: int) -> np.ndarray:
    """[resamples, units] how often each unit is drawn."""
    random = np.random.default_rng(seed)
    return random.multinomial(units, np.full(units, 1 / units), RESAMPLES).astype(float)


def over_rows(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over the rows of one prompt, [..., rows] with NaN for rows that have none.

    Neighbouring rows depend on each other, so contiguous blocks of about sqrt(rows) rows are drawn
    (block bootstrap, Künsch 1989). It says how the mean varies along this prompt, and nothing about
    other prompts.
    """
    scored = ~np.isnan(values)
    starts = np.arange(0, values.shape[-1], max(1, int(np.sqrt(values.shape[-1]))))
    sums = np.add.reduceat(np.where(scored, values, 0), starts, axis=-1)
    counts = np.add.reduceat(scored.astype(float), starts, axis=-1)
    return over_units(np.moveaxis(sums, -1, 0), np.moveaxis(counts, -1, 0), seed)
