"""Figure of `lens.heads.patterns`: which sparse pattern each head would survive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.plots import draws
from lens.figures.style import Look, grid_height, style, tick_step

if TYPE_CHECKING:
    from lens.heads.behaviour.patterns import PatternClasses

_COLORS = {
    "a_shape": "#355f8d",
    "vertical_slash": "#22a884",
    "block_sparse": "#f4a582",
    "diffuse": "#8a8f98",
}


@draws("PatternClasses")
def pattern_grid(result: PatternClasses, **look: Unpack[Look]) -> go.Figure:
    """Layers down, heads across, one colour per class; kept masses on hover."""
    table = result.table()
    heads = result.classes.shape[1]
    first, last = int(table["layer"].min()), int(table["layer"].max())
    layers = last - first + 1
    figure = go.Figure()
    for name, color in _COLORS.items():
        rows = table[table["pattern"] == name]
        if rows.empty:
            continue
        kept = rows[["a_shape", "vertical_slash", "block_sparse", "margin"]].to_numpy(float)
        figure.add_trace(
            go.Scatter(
                x=rows["head"],
                y=rows["layer"],
                mode="markers",
                name=f"{name.replace('_', '-')} ({len(rows)})",
                marker={"symbol": "square", "size": 16, "color": color},
                customdata=np.round(kept, 3),
                hovertemplate=(
                    "L%{y}H%{x}: A-shape %{customdata[0]}, vertical-slash %{customdata[1]}, "
                    "block-sparse %{customdata[2]}; margin %{customdata[3]}<extra></extra>"
                ),
            )
        )
    figure.update_xaxes(title="head", range=[-0.6, heads - 0.4], dtick=tick_step(heads))
    figure.update_yaxes(title="layer", range=[last + 0.6, first - 0.6], dtick=tick_step(layers))
    return style(
        figure,
        f"Sparse patterns within {result.budget:.0%} of the pairs: {result.model}",
        look,
        height=grid_height(layers),
        meta={"figure": "pattern_grid", "budget": result.budget, "prompts": result.n},
    )
