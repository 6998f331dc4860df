"""Other scores than those of edges: of heads and MLPs by gates, of routes, of codes."""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
