"""Vision-language models: which tokens are system, image and text, and images as grids.

>>> segments = lens.vision.segments(model, inputs)
>>> with lens.edits.var(model, segments.keys("image")) as edit:
...     model.model.generate(**inputs, max_new_tokens=20)
>>> lens.vision.grid(segments, values).findings()
>>> lens.vision.knock_out(model, inputs).findings()
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
