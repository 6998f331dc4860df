"""Circuits by search instead of by scores: edges taken out one after another, gates learned."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
