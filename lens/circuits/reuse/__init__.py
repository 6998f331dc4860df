"""What circuits of different tasks share, and what they do for each other."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
