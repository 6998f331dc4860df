"""Reading heads: why a query attends to a key, exactly, and what that rests on.

>>> why = lens.reading.explain(model, "It was the best of times, it was the", "L1H3", query=-1, key=2)
>>> why.table(), why.side("key"), why.findings()
>>> lens.reading.explain_pairs(model, texts, "L1H3", "previous").side("key")

docs/reading.md says what the numbers mean.
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
