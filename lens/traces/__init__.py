"""Traces: what one prompt did in every head of a model, kept, read, scored and put into words."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
