"""Tasks: prompts with a measure of how well a model does on each of them.

>>> task = lens.tasks.induction(model, n=64, seed=0)
>>> task.evaluate(model).mean()
"""

from lens.tasks.colored_objects import colored_objects
from lens.tasks.docstring import docstring
from lens.tasks.greater_than import greater_than
from lens.tasks.ioi import ioi
from lens.tasks.jsonl import from_jsonl
from lens.tasks.making import induction, language_modelling
from lens.tasks.metrics import METRICS, AnswerSets
from lens.tasks.task import Task

__all__ = [
    "METRICS",
    "AnswerSets",
    "Task",
    "colored_objects",
    "docstring",
    "from_jsonl",
    "greater_than",
    "induction",
    "ioi",
    "language_modelling",
]
