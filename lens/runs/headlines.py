"""Headlines: what an analysis found beside what it would be if there were nothing to find, and how surprising it is.

A section hands its headlines over as records and `section.json` keeps them; report, page and console show the most
surprising ones first and compute nothing anew.

    gap      = how far the nearer end of the value's interval lies beyond the baseline; 0 where it holds the baseline
    scale    = the baseline's own spread (the interval of a control, the scatter of heads), or where the baseline is
               exact its size (of a share its distance to 0 or 1, the nearer one); at least 1 % of the value's size, and where that is
               nothing too 1 % of the baseline's
    surprise = min(gap / scale, 100)

The highest of many values has the interval of the highest of many (`lens.stats.verdicts.of_many`): by chance one of 24
plain ones lies beside the truth more often than not.

A finding whose interval holds its baseline has a surprise of 0. No headline is one of less than 0.5 where the baseline
scatters (the difference of two with intervals of one width excludes 0 from 0.41 on), or than 0.1 where it is exact. One without an
interval (a single prompt) stands behind all that have one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lens.common.errors import LensError
from lens.stats.verdicts import of_many

_FLOOR = 0.01
_BESIDE, _BEYOND = (
    0.5,
    0.1,
)  # least surprise beside a baseline that scatters, and beyond an exact one
_ROUNDING = 1e-5  # of a value: what single precision makes of nothing
_SCATTER = 1.4826  # of the median absolute deviation, for a standard deviation


@dataclass(frozen=True)
class Headline:
    """One thing that an analysis found.

    Attributes:
        text: the sentence, with its numbers.
        value: what was measured.
        low, high: its 95 % interval; NaN where there is none.
        baseline: what the value would be if there were nothing to find.
        against: what that is: uniform attention, random circuits, the median head.
        spread: how far the baseline itself scatters, in the value's unit; NaN where it is exact.
        unit: of value and baseline, "" for a share or a score.
        figure: of the section that shows it, "" for none.
        many: how many values it was chosen of, as the highest head of 24; 1: none.
        units: such as prompts, that the interval is of; 0: not known.

    Example:
        >>> from lens.runs.headlines import Headline
        >>> one = Headline("L1H3 is an induction head.", 0.92, 0.89, 0.94, baseline=0.03, against="uniform attention")
        >>> round(one.surprise, 1)
        28.7
    """

    text: str
    value: float
    low: float
    high: float
    baseline: float
    against: str
    spread: float = math.nan
    unit: str = ""
    figure: str = ""
    many: int = 1
    units: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and math.isfinite(self.baseline)):
            raise LensError(
                f"a headline needs a value and a baseline that are numbers, got {self.value} and "
                f"{self.baseline}; leave it out: {self.text}"
            )
        if self.is_sure and not self.low <= self.high:
            raise LensError(f"low must not be above high, got [{self.low}, {self.high}]")

    @property
    def is_sure(self) -> bool:
        """Whether the value has an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high end of the interval of the highest of as many as the value was chosen of; NaN where there is none."""
        if not self.is_sure:
            return math.nan, math.nan
        return of_many(self.value, self.low, self.high, self.many, self.units)

    @property
    def surprise(self) -> float:
        """How many times the baseline's scale the value lies beyond it, as this module defines it."""
        low, high = self.ends if self.is_sure else (self.value, self.value)
        gap = max(low - self.baseline, self.baseline - high, 0.0)
        scale = self.spread if math.isfinite(self.spread) else abs(self.baseline)
        if math.isnan(self.spread) and not self.unit and 0 <= self.baseline <= 1:
            scale = min(
                scale, 1 - self.baseline
            )  # a share of 0.95 has not as far to go as one of 0.5
        scale = max(scale, _FLOOR * abs(self.value)) or _FLOOR * abs(self.baseline)
        return min(gap / scale, 1 / _FLOOR) if gap else 0.0

    @property
    def stands(self) -> bool:
        """Whether the value is far enough from its baseline to be told, as this module defines it."""
        return self.surprise >= (_BESIDE if math.isfinite(self.spread) else _BEYOND)

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: None if value != value else value for name, value in values.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Headline:
        """What `as_json` gave."""
        values: dict[str, Any] = {
            part.name: stored[part.name] for part in fields(cls) if part.name in stored
        }
        known: dict[str, Any] = {
            name: math.nan if value is None else value for name, value in values.items()
        }
        return cls(**known)


def highest(
    values: Iterable[float], lows: Iterable[float], highs: Iterable[float], units: int = 0
) -> tuple[int, dict[str, Any]]:
    """The largest of many like values, beside the others: their median and how far they scatter.

    Args:
        values, lows, highs: of each, such as one a head; NaN where there is none.
        units: such as prompts, that the intervals are of; 0: not known.

    Returns:
        Its number, and the fields of a `Headline` from value to spread, many and units. A median that single precision cannot tell
        from nothing beside the largest is 0. The spread is 1.4826 times the median absolute deviation of the
        others, and where these are all alike half of the interval.

    Raises:
        LensError: fewer than two have a value.
    """
    scores = np.asarray(list(values), float)
    if np.isfinite(scores).sum() < 2:
        raise LensError("one value has no others to be compared with")
    best = int(np.nanargmax(scores))
    others = np.delete(scores, best)
    others = others[np.isfinite(others)]
    median = float(np.median(others))
    low, high = (float(list(ends)[best]) for ends in (lows, highs))
    scatter = _SCATTER * float(np.median(np.abs(others - median)))
    if abs(median) < _ROUNDING * abs(scores[best]):
        median = 0.0
    return best, {
        "value": float(scores[best]),
        "low": low,
        "high": high,
        "baseline": median,
        "spread": scatter or (high - low) / 2,
        "many": len(others) + 1,
        "units": units,
    }


def higher_chance(uniform: float, random_weights: float) -> tuple[str, float, str] | None:
    """What a score of a head would be by chance: with uniform attention, and the highest with random weights.

    Args:
        uniform, random_weights: the score of each; NaN where it is not known.

    Returns:
        Which of them is higher, how high it is, and both in words; None where neither is known.
    """
    chance = {"uniform attention": float(uniform), "random weights": float(random_weights)}
    known = {words: value for words, value in chance.items() if not math.isnan(value)}
    if not known:
        return None
    against = max(known, key=lambda words: known[words])
    both = " and ".join(f"{value:.2f} with {words}" for words, value in known.items())
    return against, known[against], both


def those_that_stand(found: Iterable[Headline]) -> tuple[Headline, ...]:
    """Without those that their baseline explains."""
    return tuple(one for one in found if one.stands)


def is_above_nothing(found: Mapping[str, Any], whole: float = 0.0) -> bool:
    """Whether what `highest` found is an effect: its interval, that of the highest of many, lies above 0, and it above what single precision makes of it.

    Args:
        found: fields of a `Headline`, with `value` and `low`, and `many` where it was chosen.
        whole: size of what is changed, such as the loss of the model as it is; 0: not known.

    Example:
        >>> from lens.runs.headlines import is_above_nothing
        >>> is_above_nothing({"value": 1e-5, "low": 2e-6}, whole=8.0)
        False
    """
    low = found["value"]
    if not math.isnan(found["low"]):
        many, units = int(found.get("many", 1)), int(found.get("units", 0))
        low, _ = of_many(low, found["low"], low, many, units)
    return low > 0 and found["value"] > _ROUNDING * abs(whole)


def is_rounding(whole: float, *changes: float) -> bool:
    """Whether all these changes are no more than what single precision makes of none.

    Args:
        whole: size of what is changed, such as the metric of the model as it is.
        changes: of it, such as by an edit and by its control; NaN is none.

    Example:
        >>> from lens.runs.headlines import is_rounding
        >>> is_rounding(0.5, -4e-8, 1e-8)
        True
    """
    return not any(abs(one) > _ROUNDING * abs(whole) for one in changes)
