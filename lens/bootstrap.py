"""95 % percentile bootstrap intervals of means, for many heads at a time."""

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
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (draws @ sums) / (draws @ counts)
    few = (counts > 0).sum(0) < 2
    means[:, few] = 0
    ends = np.nanpercentile(means, _ENDS, axis=0)
    low, high = np.where(few, np.nan, ends)
    return low.reshape(shape), high.reshape(shape)


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
