"""Token segments of a vision-language prompt, as `lens.traces` keeps them."""

from lens.traces.segments import Segments, segments, trace_segments

__all__ = ["Segments", "segments", "trace_segments"]
