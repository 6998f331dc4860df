"""Intervals, ranks and clusters on plain numbers: what every room says about its own numbers.

>>> low, high = lens.stats.interval(draws)
>>> lens.stats.kendall(measures)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
