from .distances import patch_distance as patch_distance
from .images import grid as grid
from .knocking import knock_out as knock_out
from .tokens import segments as segments
from .tokens import trace_segments as trace_segments
