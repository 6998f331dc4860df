"""Intervals of means from units drawn again, for many heads at a time, and quantiles.

Drawn again, few units vary less than they do: of two prompts every second interval of the middle 95 % of the draws
leaves out the truth, of four every fifth. Intervals of means are longer by what that takes (`longer`).
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lens.common.choices import Seed, check_counts, is_number, is_whole
from lens.common.errors import LensError

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

_MOST = 2**27  # numbers of a drawing
_AT_ONCE = 2**24  # means of draws that are held at a time
LEVEL = 0.95  # of every interval: this share of the draws lies inside
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_RESAMPLES = 1000
_ROUNDING = 1e-6  # that shares of single precision pass 0 and 1 by


def quantile(values: ArrayLike, share: float, *, axis: int = -1) -> Any:
    """The number below which `share` of the values lie, linear between the two next to it.

    Args:
        values: [..., n] along `axis`.
        share: 0 to 1.

    Returns:
        [...], NaN where one of the values is.

    Raises:
        LensError: no values, or a share outside of 0 to 1.

    Example:
        >>> float(lens.stats.quantile([1, 2, 3, 4], 0.5))
        2.5
    """
    if not (is_number(share) and 0 <= share <= 1):
        raise LensError(f"share must be 0 to 1, got {share}; 0.5 is the median")
    return np.quantile(_last(values, axis), share, axis=-1)


def interval(draws: ArrayLike, *, axis: int = 0) -> tuple[Any, Any]:
    """Low and high end of the middle `LEVEL` of draws: the percentile interval (Efron 1979).

    Args:
        draws: [draws, ...] along `axis`; NaN for a draw from which nothing could be computed, which
            is left out.

    Returns:
        [...] each, numbers where there is one axis; NaN where there is no draw.

    Raises:
        LensError: a number instead of draws.

    Example:
        >>> [round(float(end), 2) for end in lens.stats.interval(range(101))]
        [2.5, 97.5]
    """
    values = _last(draws, axis, least=0)
    ordered = np.sort(values, axis=-1)  # NaN at the end
    found = np.count_nonzero(~np.isnan(ordered), axis=-1)
    if not ordered.shape[-1]:
        nothing = np.full(found.shape, np.nan)[()]
        return nothing, nothing
    low, high = (_at(ordered, end * (found - 1).clip(0)) for end in _ENDS)
    return low, high


def draws(
    units: int, seed: int | np.random.Generator, resamples: int = _RESAMPLES
) -> Float[np.ndarray, "draws units"]:
    """[draws, units] how often each unit (such as a prompt) is drawn, `units` times in all.

    Args:
        units: that there are; seed: of the draws, or a generator that goes on.

    Raises:
        LensError: no unit, no resample, or a seed that is none.

    Example:
        >>> lens.stats.draws(5, seed=0, resamples=2).sum(1).tolist()
        [5.0, 5.0]
    """
    if not all(is_whole(one) and one >= 1 for one in (units, resamples)):
        raise LensError(
            f"units and resamples must be at least 1, got {units} and {resamples}; nothing is drawn "
            "from nothing"
        )
    if isinstance(seed, np.random.Generator):
        return _drawn(units, seed, resamples)
    check_counts(0, seed=seed)
    return _drawn_before(units, seed, resamples)


def over_units(
    sums: Shaped[np.ndarray, "units *rest"],
    counts: Shaped[np.ndarray, "units *rest"],
    seed: Seed,
    *,
    shares: bool = True,
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Interval of `sum(sums) / sum(counts)` when whole units (such as prompts) are drawn again.

    The arms of the percentile interval, `longer` for the few units that there are. Where no unit is below 0, or none
    above it, the ends do not pass 0 either.

    Args:
        sums, counts: [units, ...] of each unit; counts are not negative.
        seed: of the draws.
        shares: that values which all lie between 0 and 1 are shares, so that ends do not pass 1 either.

    Returns:
        Low and high end, [...] each; NaN where fewer than two units have a count.

    Raises:
        LensError: sums and counts of two shapes, or no unit.

    Reference: Hesterberg 2015, Am. Stat. 69 (the percentile interval of few units is too narrow, and by how much).

    Example:
        >>> low, high = lens.stats.over_units(np.array([1.0, 2, 3, 4]), np.ones(4), seed=0)
        >>> bool(low < 2.5 < high)
        True
    """
    if np.shape(sums) != np.shape(counts):
        raise LensError(
            f"sums and counts must have one shape, got {np.shape(sums)} and {np.shape(counts)}; give "
            "each unit its sum and how many values are in it"
        )
    if not isinstance(shares, bool):
        raise LensError(f"shares must be True or False, got {shares!r}")
    units, shape = len(sums), sums.shape[1:]
    sums, counts = sums.reshape(units, -1), counts.reshape(units, -1).astype(float)
    drawn = draws(units, seed)
    step = max(1, _AT_ONCE // len(drawn))
    parts = [
        _drawn_ends(drawn, sums[:, start : start + step], counts[:, start : start + step], shares)
        for start in range(0, max(1, sums.shape[1]), step)
    ]
    low, high = np.concatenate(parts, -1)
    return low.reshape(shape), high.reshape(shape)


def _drawn_ends(
    drawn: np.ndarray, sums: np.ndarray, counts: np.ndarray, shares: bool
) -> np.ndarray:
    """[2, columns]: ends of the interval of each column of `sums / counts` [units, columns]."""
    units = (counts > 0).sum(0)
    few = units < 2
    total = drawn @ np.where(few, 1, counts)
    some = total > 0  # a resample may miss every unit that has a count
    means = np.where(some, drawn @ sums / np.where(some, total, 1), np.nan)
    mean = sums.sum(0) / np.where(few, 1, counts).sum(0)
    least, most = _ends_of_values(sums / np.where(counts > 0, counts, np.nan), shares)
    return np.where(few, np.nan, around(mean, means, units, least=least, most=most))


def _ends_of_values(each: np.ndarray, shares: bool) -> tuple[np.ndarray, np.ndarray]:
    """How far an interval of means of these values [units, columns] goes at most."""
    least, most = np.fmin.reduce(each), np.fmax.reduce(each)
    above, below = least >= -_ROUNDING, most <= _ROUNDING
    within = shares & above & (most <= 1 + _ROUNDING)
    return (
        np.where(above, np.minimum(least, 0), -np.inf),
        np.where(within, np.maximum(most, 1), np.where(below, np.maximum(most, 0), np.inf)),
    )


def around(
    value: ArrayLike,
    drawn: ArrayLike,
    units: ArrayLike,
    *,
    least: ArrayLike = -np.inf,
    most: ArrayLike = np.inf,
) -> tuple[Any, Any]:
    """Interval of any statistic of few units that is about as often too high as too low when they are drawn again.

    Args:
        value: of all units, [...]; drawn: of each draw, [draws, ...].
        units: such as prompts, that were drawn; the arms of the percentile interval are `longer` by it.
        least, most: that the statistic can be; the ends lie between.

    Example:
        >>> from lens.stats.intervals import around
        >>> [round(float(end), 1) for end in around(50.0, range(101), units=8)]
        [-11.3, 111.3]
    """
    arms = longer(units) * (np.stack(interval(drawn)) - value)
    low, high = np.clip(value + arms, least, most)
    return low, high


def longer(units: ArrayLike, miss: float = _ENDS[0]) -> Any:
    """How many times as long as drawn again the arms of an interval of so few units have to be.

    `t / z * sqrt(n / (n - 1))`: units drawn again vary as if divided by n and not by n - 1, and their spread is itself
    known from n units alone (Student's t in place of the normal distribution).

    Args:
        units: that were drawn, [...]; 1 where there are fewer than two, which have no interval.
        miss: the share that lies beyond each end.

    Example:
        >>> from lens.stats.intervals import longer
        >>> [round(float(longer(units)), 2) for units in (2, 4, 8, 32, 1000)]
        [9.17, 1.87, 1.29, 1.06, 1.0]
    """
    from scipy.special import stdtrit

    n = np.maximum(units, 2)
    times = stdtrit(n - 1, 1 - miss) / NormalDist().inv_cdf(1 - miss) * np.sqrt(n / (n - 1))
    return np.where(np.less(units, 2), 1.0, times)


def of_share(share: float, units: int) -> tuple[float, float]:
    """Interval of a share of units: it stays inside 0 to 1, and is no point at either end, as drawing again would be.

    Args:
        share: 0 to 1; units: that it is a share of.

    Raises:
        LensError: a share outside of 0 to 1, or no unit.

    Reference: Wilson 1927, J. Am. Stat. Assoc. 22.

    Example:
        >>> from lens.stats.intervals import of_share
        >>> [round(end, 3) for end in of_share(1.0, 10)]
        [0.722, 1.0]
    """
    check_counts(units=units)
    if not (is_number(share) and 0 <= share <= 1):
        raise LensError(f"share must be 0 to 1, got {share}")
    z = NormalDist().inv_cdf(_ENDS[1])
    middle, spread = share + z * z / (2 * units), share * (1 - share) / units
    half = z * (spread + (z / (2 * units)) ** 2) ** 0.5
    whole = 1 + z * z / units
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def columns(
    name: str,
    values: Shaped[np.ndarray, "*rest units"],
    seed: int,
    *,
    plain: bool = False,
    known: bool = False,
    shares: bool = True,
    trials: bool = False,
) -> dict[str, Any]:
    """Columns of a table: `name`, a mean over units (such as prompts), and the ends of its interval.

    Args:
        name: of the column with the mean.
        values: [..., units]; the other axes become rows.
        seed: of the draws.
        plain: call the ends `low` and `high`, where the table has one interval; else `<name>_low`, `<name>_high`.
        known: leave units out that have NaN, of each row its own; else one of them makes the row NaN.
        shares: as in `over_units`; not of losses, scores and changes.
        trials: units are trials that succeed, in whole or in part, or fail: where all did alike the ends are those of
            `of_share`, as drawing again shows no other end, however few there are.

    Example:
        >>> from lens.stats.intervals import columns
        >>> found = columns("recall", np.array([[1.0, 1, 1, 1]]), seed=0, trials=True)
        >>> {name: value.round(2).tolist() for name, value in found.items()}
        {'recall': [1.0], 'recall_low': [0.51], 'recall_high': [1.0]}
    """
    units = np.moveaxis(values, -1, 0)
    counted = ~np.isnan(units) if known else np.ones_like(units)
    low, high = over_units(np.where(counted, units, 0), counted, seed, shares=shares)
    mean = np.ravel(known_mean(values) if known else values.mean(-1))
    low, high = np.ravel(low), np.ravel(high)
    for alike in (0.0, 1.0) if trials else ():
        rows = (mean == alike) & ~np.isnan(low)
        low[rows], high[rows] = of_share(alike, len(units))
    start = "" if plain else f"{name}_"
    return {name: mean, f"{start}low": low, f"{start}high": high}


def known_mean(values: Shaped[np.ndarray, "..."], axis: int = -1) -> Float[np.ndarray, "..."]:
    """Mean over an axis of what is not NaN; NaN where nothing is known.

    Example:
        >>> from lens.stats.intervals import known_mean
        >>> known_mean(np.array([[1.0, 3.0, np.nan], [np.nan] * 3])).tolist()
        [2.0, nan]
    """
    known = ~np.isnan(values)
    n = known.sum(axis)
    return np.where(known, values, 0).sum(axis) / np.where(n == 0, np.nan, n)


def over_rows(
    values: Float[np.ndarray, "*rest rows"], seed: Seed
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Interval of the mean over the rows of one prompt, [..., rows] with NaN for rows that have none.

    Neighbouring rows depend on each other, so contiguous blocks of about sqrt(rows) rows are drawn
    (block bootstrap, Künsch 1989). It says how the mean varies along this prompt, and nothing about
    other prompts.

    Example:
        >>> low, high = lens.stats.over_rows(np.random.default_rng(0).normal(size=(3, 40)), seed=0)
        >>> low.shape
        (3,)
    """
    scored = ~np.isnan(values)
    starts = np.arange(0, values.shape[-1], max(1, int(np.sqrt(values.shape[-1]))))
    sums = np.add.reduceat(np.where(scored, values, 0), starts, axis=-1)
    counts = np.add.reduceat(scored.astype(float), starts, axis=-1)
    return over_units(np.moveaxis(sums, -1, 0), np.moveaxis(counts, -1, 0), seed)


@lru_cache(maxsize=8)
def _drawn_before(units: int, seed: int, resamples: int) -> np.ndarray:
    """The same draws again: the tables of one prompt set ask for them many times."""
    found = _drawn(units, np.random.default_rng(seed), resamples)
    found.flags.writeable = False
    return found


def _drawn(units: int, random: np.random.Generator, resamples: int) -> np.ndarray:
    if units * resamples > _MOST:
        raise LensError(
            f"{resamples:,} resamples of {units:,} units are more than fit into memory; ask for fewer"
        )
    return random.multinomial(units, np.full(units, 1 / units), resamples).astype(float)


def numbers(values: ArrayLike) -> np.ndarray:
    """As float64, of at least one dimension; raises LensError where they are none."""
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError, OverflowError) as error:
        raise LensError(f"values must be numbers, got {type(values).__name__}: {error}") from error
    if not array.ndim:
        raise LensError("expected several numbers, got a single one; give an array")
    return array


def _last(values: ArrayLike, axis: int, *, least: int = 1) -> np.ndarray:
    """The values as floats, `axis` the last one."""
    array = numbers(values)
    if not is_whole(axis) or not -array.ndim <= axis < array.ndim:
        raise LensError(f"axis must be one of {array.ndim}, got {axis!r}")
    if array.shape[axis] < least:
        raise LensError(f"expected at least {least} value along axis {axis}, got {array.shape}")
    return np.moveaxis(array, axis, -1)


def _at(ordered: np.ndarray, place: ArrayLike) -> Any:
    """Value at a place [...] between those of `ordered` [..., n], linear between its neighbours."""
    below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
    left, right = (
        np.take_along_axis(ordered, one[..., None], -1)[..., 0] for one in (below, above)
    )
    return left + (right - left) * (place - below)
