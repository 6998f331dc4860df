"""Tasks: prompts with a measure of how well a model does on each of them.

>>> task = lens.tasks.induction(model, n=64, seed=0)
>>> task.evaluate(model).mean()
"""

from lens.tasks.jsonl import from_jsonl
from lens.tasks.making import induction, language_modelling
from lens.tasks.metrics import METRICS, AnswerSets
from lens.tasks.task import Task

__all__ = ["METRICS", "AnswerSets", "Task", "from_jsonl", "induction", "language_modelling"]
