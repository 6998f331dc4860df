"""Figure of `lens.circuits.patch` and `path_patch`: what each node moves, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import DIVERGING, scale
from lens.common.plots import draws
from lens.figures.style import Look, style

if TYPE_CHECKING:
    from lens.circuits.patches.effects import PatchEffects


@draws("PatchEffects")
def patch_map(effects: PatchEffects, **look: Unpack[Look]) -> go.Figure:
    """Nodes down, positions across: share of the difference between both runs that the patch moves."""
    values = effects.effects
    bound = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[str(place) for place in effects.positions],
            y=list(effects.nodes),
            colorscale=scale(DIVERGING),
            zmin=-bound,
            zmid=0,
            zmax=bound,
            colorbar={"title": {"text": "share moved", "side": "right"}, "thickness": 12},
            hovertemplate="%{y} at %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="token", type="category", showgrid=False)
    figure.update_yaxes(title="node", type="category", autorange="reversed", showgrid=False)
    best = "nothing, both runs have the same metric"
    if effects.whole:
        best = effects.strongest
    return style(
        figure,
        f"{effects.direction} on {effects.task}: most at {best}",
        look,
        height=max(320, 13 * len(effects.nodes) + 110),
        meta={"task": effects.task, "model": effects.model, "direction": effects.direction},
    )
