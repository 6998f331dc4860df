"""Vision-language models: which tokens are system, image and text, and images as grids.

>>> segments = lens.vision.segments(model, inputs)
>>> with lens.redistribution.var(model, segments.keys("image")) as edit:
...     model.model.generate(**inputs, max_new_tokens=20)
>>> lens.vision.grid(segments, values).findings()
>>> lens.vision.knock_out(model, inputs).findings()
"""

import importlib
from typing import TYPE_CHECKING, Any

from lens.vision.images import ImageGrid, grid
from lens.vision.tokens import Segments, segments, trace_segments

if TYPE_CHECKING:
    from lens.vision.knocking import KnockOut, knock_out

__all__ = [
    "ImageGrid",
    "KnockOut",
    "Segments",
    "grid",
    "knock_out",
    "segments",
    "trace_segments",
]


def __getattr__(name: str) -> Any:
    if name in (
        "KnockOut",
        "knock_out",
    ):  # they need lens.sinks and lens.captures, which need `tokens`
        return getattr(importlib.import_module("lens.vision.knocking"), name)
    raise AttributeError(f"module 'lens.vision' has no attribute {name!r}")
