"""Vision-language models: which tokens are system, image and text, and images as grids.

>>> segments = lens.vision.segments(model, inputs)
>>> with lens.redistribution.var(model, segments.keys("image")) as edit:
...     model.model.generate(**inputs, max_new_tokens=20)
>>> lens.vision.grid(segments, values).findings()
"""

from lens.vision.images import ImageGrid, grid
from lens.vision.tokens import Segments, segments, trace_segments

__all__ = ["ImageGrid", "Segments", "grid", "segments", "trace_segments"]
