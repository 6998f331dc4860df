"""Which heads matter to a task, by whose measure, and what their weights alone say.

>>> task = lens.tasks.induction(model, n=64, seed=0)
>>> lens.heads.importance(small, copying, method="ablation", baseline="mean").top(3)
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
