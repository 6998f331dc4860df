"""See what every attention head of a real model does, without building the N×N matrix.

>>> import lens
>>> model = lens.load("text-lm-3l")
>>> trace = lens.capture(model, "It was the best of times, it was the worst of times")
>>> lens.profile(trace)

Everything is loaded on first use: `import lens` itself brings neither torch nor transformers.
"""

from lens.common.lazy import attach
from lens.common.version import __version__ as __version__

__getattr__, __dir__, __all__ = attach(__name__, __file__)
