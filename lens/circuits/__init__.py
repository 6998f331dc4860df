"""Circuits: which heads, MLPs and edges between them carry a task.

>>> known = lens.circuits.known.induction_transformer(beta=30)
>>> lens.heads.importance(known.model, known.task, by="ablation", baseline="counterfactual")
"""

from lens.circuits import known

__all__ = ["known"]
