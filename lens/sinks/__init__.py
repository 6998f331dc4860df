"""Attention sinks: which keys attention is parked on, how often, and how sure that is.

>>> traces = lens.capture(model, texts, statistics=["received"])
>>> lens.sinks.rate(traces).value
>>> lens.sinks.find(traces[0]).table()

After Gu et al., "When Attention Sink Emerges", arXiv 2410.10781.
"""

from lens.sinks.detection import SinkRate, SinkSensitivity, rate, sensitivity
from lens.sinks.positions import SinkKeys, SinkProfile, find, profile

__all__ = [
    "SinkKeys",
    "SinkProfile",
    "SinkRate",
    "SinkSensitivity",
    "find",
    "profile",
    "rate",
    "sensitivity",
]
