"""What a model can do without: groups of heads, heads one after another, far keys, seen by several metrics.

>>> lens.heads.pruning.ablate(small, lens.tasks.induction(small, n=4), heads=["L1H0", "L1H2"]).n
4
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
