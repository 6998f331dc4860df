"""The figure of `lens.traces.alignment`: how well each head of the cross-attention aligns target and source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.colors import VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.style import Look, escaped, style, tick_step

if TYPE_CHECKING:
    from lens.traces.alignment import Alignment


@draws("Alignment")
def alignment_map(found: Alignment, **look: Unpack[Look]) -> go.Figure:
    """Layers down, heads across: accuracy of the strongest key, or its monotonicity where there are no labels."""
    name = "accuracy" if found.labelled else "monotonicity"
    table = found.table()
    grid = table.pivot(index="layer", columns="head", values=name)
    figure = go.Figure(
        go.Heatmap(
            z=grid.values,
            x=grid.columns,
            y=grid.index,
            colorscale=scale(VIRIDIS),
            zmin=0 if found.labelled else -1,
            zmax=1,
            colorbar={"title": name},
            hovertemplate="L%{y}H%{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="head", dtick=tick_step(grid.shape[1]))
    figure.update_yaxes(title="layer", autorange="reversed", dtick=tick_step(grid.shape[0]))
    title = f"{escaped(found.model)}: {name} of the strongest key"
    return style(figure, title, look, meta={"figure": "alignment_map", "model": found.model})
