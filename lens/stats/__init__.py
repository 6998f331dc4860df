"""Intervals, ranks and clusters on plain numbers: what every room says about its own numbers.

>>> from lens import stats
>>> [round(float(end), 2) for end in stats.interval(range(101))]
[2.5, 97.5]
>>> stats.kendall([[1, 2, 3, 4], [1, 2, 4, 3]]).round(2).tolist()
[[1.0, 0.67], [0.67, 1.0]]
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
