"""Pure functions from results to plotly figures: the same in notebook, report and dashboard.

No file, no network, no torch, and nothing is shown as a side effect. Every function ends in the
keyword arguments of `lens.figures.style.Look`: `title`, `width`, `height`, `theme`.
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
