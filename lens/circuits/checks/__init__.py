"""Whether a circuit is what is claimed of it."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
