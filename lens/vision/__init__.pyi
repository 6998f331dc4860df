from .distances import patch_distance as patch_distance
from .grounding import grounding as grounding
from .images import grid as grid
from .knocking import knock_out as knock_out
from .tokens import overlay as overlay
from .tokens import segments as segments
from .tokens import trace_segments as trace_segments
