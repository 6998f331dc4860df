"""Circuits: which heads, MLPs and edges between them carry a task.

>>> known = lens.circuits.known.induction_transformer(beta=30)
>>> lens.heads.importance(known.model, known.task, method="ablation", baseline="counterfactual")
>>> edges = lens.circuits.score_edges(known.model, known.task, method="exact")
>>> edges.top(7)
>>> lens.circuits.evaluate(known.model, known.task, edges)
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
