"""Token segments of a vision-language prompt and attention on its picture, as `lens.traces` keeps them."""

from lens.traces.overlays import Overlay, overlay
from lens.traces.segments import Segments, segments, trace_segments

__all__ = ["Overlay", "Segments", "overlay", "segments", "trace_segments"]
