"""Tasks: prompts with a measure of how well a model does on each of them.

>>> task = lens.tasks.induction(model, n=64, seed=0)
>>> task.evaluate(model).mean()
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
