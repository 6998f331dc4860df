"""What intervals tell apart: a value beside a number, and the best of many beside the others; a mean in words."""

from __future__ import annotations

from functools import cache
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lens.common.choices import Seed, check_counts
from lens.common.results import ends, written
from lens.stats.intervals import LEVEL, columns, over_units

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

Verdict = Literal["above", "below", "not told apart"]
APART: tuple[Verdict, ...] = "above", "below"


def verdict(low: float, high: float, beside: float = 0.0) -> Verdict:
    """Where a value lies beside a number: what its whole interval says, never the value alone.

    Args:
        low, high: of its interval; NaN where there is none, as of a single prompt, which tells nothing apart.
        beside: what it is compared with, such as no change.

    Example:
        >>> from lens.stats.verdicts import verdict
        >>> [verdict(*ends) for ends in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3))]
        ['above', 'below', 'not told apart']
    """
    if low > beside:
        return "above"
    return "below" if high < beside else "not told apart"


def leave_out_0(low: Any, high: Any) -> Any:
    """Whether intervals leave out 0, of each of many; those that are NaN do not.

    Example:
        >>> from lens.stats.verdicts import leave_out_0
        >>> leave_out_0(np.array([0.1, -0.1, np.nan]), np.array([0.3, 0.3, np.nan])).tolist()
        [True, False, False]
    """
    return (low > 0) | (high < 0)


def of_many(
    value: float,
    low: float,
    high: float,
    many: int,
    units: int,
    *,
    least: float = -inf,
    most: float = inf,
) -> tuple[float, float]:
    """The interval of the highest or lowest of many values, wide enough that it holds what there is by chance.

    One of 24 intervals of 95 % lies beside the truth more often than not, and the highest value is the likeliest one.
    Both arms are as much longer as those of Student's t at a level of 1 - 0.05 / many (Bonferroni).

    Args:
        value, low, high: as if it had not been chosen; many: that it was chosen of.
        units: such as prompts, that the interval is of; 0: not known, as if they were many.
        least, most: that a value can be, such as 0 and 1 of a share; the ends lie between.

    Example:
        >>> from lens.stats.verdicts import of_many
        >>> [round(end, 2) for end in of_many(1.0, 0.0, 2.0, 24, units=1000)]
        [-0.57, 2.57]
    """
    check_counts(many=many)
    check_counts(0, units=units)
    times = _times(many, units)
    found = value - times * (value - low), value + times * (high - value)
    low, high = np.clip(found, least, most).tolist()
    return low, high


@cache
def _times(many: int, units: int) -> float:
    """How many times as long the arms of the highest of many are as those of one that was not chosen."""
    from scipy.special import stdtrit

    free = max(units - 1, 1) if units else inf
    miss = (1 - LEVEL) / 2
    return float(stdtrit(free, 1 - miss / many) / stdtrit(free, 1 - miss))


def of_many_told(
    row: Any,
    name: str,
    form: str,
    many: int,
    units: int,
    *,
    plain: bool = False,
    unit: str = "",
    least: float = -inf,
    most: float = inf,
) -> str:
    """The highest or lowest of many in words, its interval that of `of_many`; `row` and `plain` as of `with_ends`."""
    start = "" if plain else f"{name}_"
    held = row[f"{start}low"], row[f"{start}high"]
    return f"{written(row[name], form)}{unit}{ends(*of_many(row[name], *held, many, units, least=least, most=most), form)}"


def rivals(values: Float[np.ndarray, "members units"], best: int, seed: Seed) -> list[int]:
    """The members that are not told apart from the highest one, by the interval of their paired difference, as of one of as
    many (`of_many`): the highest of noise is no better than the others; highest first.

    Args:
        values: of each member (such as a head) in each unit (such as a prompt); where the lowest is meant, their negatives.
        best: the member with the highest mean.
        seed: of the intervals.

    Returns:
        None of them for a single unit, which has no interval.

    Example:
        >>> from lens.stats.verdicts import rivals
        >>> rivals(np.array([[5.0, 6, 7], [1, 2, 3], [7, 5, 6]]), 0, seed=0)
        [2]
    """
    if values.shape[1] < 2:
        return []
    apart = (values[best] - values).T
    plain, _ = over_units(apart, np.ones_like(apart), seed, shares=False)
    mean = apart.mean(0)
    low = mean - _times(max(len(values) - 1, 1), len(apart)) * (mean - plain)
    order = np.argsort(-values.mean(1), kind="stable")
    return [int(one) for one in order if one != best and not low[one] > 0]


def by_chance(many: int, sides: int = 2) -> float:
    """How many of so many intervals leave out the truth by chance, on one side or on both.

    Example:
        >>> from lens.stats.verdicts import by_chance
        >>> round(by_chance(24), 2), round(by_chance(24, sides=1), 2)
        (1.2, 0.6)
    """
    return (1 - LEVEL) * sides / 2 * many


def mean_told(
    values: Shaped[np.ndarray, " units"], seed: int, form: str = ".3g", *, trials: bool = False
) -> str:
    """The mean over units (such as prompts) with its interval, in words; `trials` as in `columns`.

    Example:
        >>> from lens.stats.verdicts import mean_told
        >>> mean_told(np.array([1.0, 2.0, 3.0, 2.0]), seed=0, form=".1f")
        '2.0 [0.6, 2.9]'
    """
    (mean,), (low,), (high,) = columns("", values[None], seed, trials=trials).values()
    return f"{written(mean, form)}{ends(low, high, form)}"


def clear_told(clear: int, many: int, what: str) -> str:
    """How many of so many have intervals that leave out 0, in words.

    Example:
        >>> from lens.stats.verdicts import clear_told
        >>> clear_told(3, 24, "heads")
        '3 of 24 heads have a 95 % interval that leaves out 0 (1.2 by chance)'
    """
    has = "has" if clear == 1 else "have"
    return f"{clear:,} of {many:,} {what} {has} a 95 % interval that leaves out 0 ({by_chance(many):.1f} by chance)"
