"""Forward passes through a model with a listener at each attention call: masks, bridge, sessions, checks."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
