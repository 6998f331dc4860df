"""Pure functions from results to plotly figures: the same in notebook, report and dashboard.

No file, no network, no torch, and nothing is shown as a side effect. Every function ends in the same
keyword arguments: `title`, `width`, `height`, `theme`.
"""

from lens.figures.head import block_map, distance_profile, received_mass, row_entropy
from lens.figures.heads import head_grid, head_scatter, metric_by_layer
from lens.figures.tokens import token_strip

__all__ = [
    "block_map",
    "distance_profile",
    "head_grid",
    "head_scatter",
    "metric_by_layer",
    "received_mass",
    "row_entropy",
    "token_strip",
]
