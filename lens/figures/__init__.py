"""Pure functions from results to plotly figures: the same in notebook, report and dashboard.

No file, no network, no torch, and nothing is shown as a side effect. Every function ends in the
keyword arguments of `lens.figures.style.Look`: `title`, `width`, `height`, `theme`.
"""

from lens.figures.agreement import agreement_map, measure_scatter
from lens.figures.comparison import comparison_scatter, difference_grid
from lens.figures.flow import flow_plot
from lens.figures.head import block_map, distance_profile, received_mass, row_entropy
from lens.figures.heads import head_grid, head_scatter, metric_by_layer
from lens.figures.importance import importance_grid
from lens.figures.layers import influence_bars, removal_curve, skip_scatter
from lens.figures.overlap import overlap_plot, redirection_plot, transfer_map
from lens.figures.patterns import pattern_grid
from lens.figures.pruning import pruning_plot
from lens.figures.roles import role_map
from lens.figures.similarity import similarity_map
from lens.figures.stability import stability_plot
from lens.figures.tokens import token_strip

__all__ = [
    "agreement_map",
    "block_map",
    "comparison_scatter",
    "difference_grid",
    "distance_profile",
    "flow_plot",
    "head_grid",
    "head_scatter",
    "importance_grid",
    "influence_bars",
    "measure_scatter",
    "metric_by_layer",
    "overlap_plot",
    "pattern_grid",
    "pruning_plot",
    "received_mass",
    "redirection_plot",
    "removal_curve",
    "role_map",
    "row_entropy",
    "similarity_map",
    "skip_scatter",
    "stability_plot",
    "token_strip",
    "transfer_map",
]
