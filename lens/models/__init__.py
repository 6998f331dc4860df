"""Models in: what the project knows by name, and how any model becomes a `LoadedModel`."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
