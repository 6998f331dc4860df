"""Which attention and MLP sub-layers a model can do without.

>>> lens.layers.importance(model, task).table()
>>> lens.layers.greedy_removal(model, task, count=3).order
"""

from lens.layers.measuring import block_influence, greedy_removal, importance
from lens.layers.scores import BlockInfluence, GreedyRemoval, SkipSweep

__all__ = [
    "BlockInfluence",
    "GreedyRemoval",
    "SkipSweep",
    "block_influence",
    "greedy_removal",
    "importance",
]
