"""Attention sinks: which keys attention is parked on, how often, and how sure that is.

>>> traces = lens.capture(model, texts, statistics=["received"])
>>> lens.sinks.rate(traces).value
>>> lens.sinks.find(traces[0]).table()

After Gu et al., "When Attention Sink Emerges", arXiv 2410.10781.
"""

from typing import TYPE_CHECKING, Any

from lens.sinks.detection import SinkRate, SinkSensitivity, rate, sensitivity
from lens.sinks.positions import SinkKeys, SinkProfile, find, profile

if TYPE_CHECKING:
    from lens.sinks.causal import SinkEffect, effect

__all__ = [
    "SinkEffect",
    "SinkKeys",
    "SinkProfile",
    "SinkRate",
    "SinkSensitivity",
    "effect",
    "find",
    "profile",
    "rate",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name in ("SinkEffect", "effect"):  # brings torch, which reading traces does not need
        from lens.sinks import causal

        return getattr(causal, name)
    raise AttributeError(f"module 'lens.sinks' has no attribute {name!r}")
