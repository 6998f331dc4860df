from .coding import coding_rate as coding_rate
from .conserved import flow as flow
from .distances import patch_distance as patch_distance
from .grounding import grounding as grounding
from .images import grid as grid
from .knocking import knock_out as knock_out
from .patterns import patterns as patterns
from .receptive import receptive_field as receptive_field
from .rings import rings as rings
from .rings import shapes as shapes
from .routes import text_flow as text_flow
from .structure import cluster as cluster
from .structure import tree as tree
from .tokens import overlay as overlay
from .tokens import segments as segments
from .tokens import trace_segments as trace_segments

__all__ = [
    "cluster",
    "coding_rate",
    "flow",
    "grid",
    "grounding",
    "knock_out",
    "overlay",
    "patch_distance",
    "patterns",
    "receptive_field",
    "rings",
    "segments",
    "shapes",
    "text_flow",
    "tree",
]
