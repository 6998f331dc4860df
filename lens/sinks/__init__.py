"""Attention sinks: which keys attention is parked on, how often, and how sure that is.

>>> traces = lens.capture(model, texts, statistics=["received"])
>>> lens.sinks.rate(traces).value
>>> lens.sinks.find(traces[0]).table()
>>> lens.effect(model, texts, lens.edits.Mask("first", heads=["L1H0"])).findings()

After Gu et al., "When Attention Sink Emerges", arXiv 2410.10781.
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
