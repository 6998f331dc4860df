"""Vision-language models: which tokens are system, image and text, and images as grids.

>>> segments = lens.vision.segments(vlm, inputs)
>>> trace = lens.capture(vlm, inputs)
>>> lens.vision.grid(segments, trace.received.mean(("layer", "head"))).findings()
>>> lens.vision.knock_out(vlm, inputs, dims=(3, 7), tau=2).findings()
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
