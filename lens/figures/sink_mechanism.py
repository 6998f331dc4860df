"""Figure of `lens.sinks.mechanism`: how much attention a head parks against what it gets for it."""

from __future__ import annotations

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import BASELINE, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.rows import head_names
from lens.figures.style import Look, style


@draws("SinkMechanism", of="table")
def mass_and_value(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Sink mass against the norm of what the sink writes, one point per head, coloured by layer.

    Below 1 the sink writes less than other tokens do: the head does little where it parks.

    Args:
        table: of `SinkMechanism`: `layer`, `head`, `alpha`, `drain`.
    """
    figure = go.Figure(
        go.Scatter(
            x=table["alpha"],
            y=table["drain"],
            mode="markers",
            text=head_names(table["layer"], table["head"]),
            marker={
                "color": table["layer"],
                "colorscale": scale(VIRIDIS),
                "size": 8,
                "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12},
            },
            hovertemplate="%{text}: mass %{x:.2f}, writes %{y:.2f}<extra></extra>",
        )
    )
    figure.add_hline(y=1, line={"color": BASELINE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="mean α of the sink", range=[-0.02, 1.02])
    figure.update_yaxes(title="|W_O v| of the sink / of other tokens", rangemode="tozero")
    parked = table[table["alpha"] > 0.3]
    found = (
        f"{len(parked)} heads park on the sink; what it writes is {parked['drain'].median():.2f} times what others do"
        if len(parked)
        else "No head parks on the sink (α above 0.3)"
    )
    return style(figure, found, look, meta={"figure": "mass_and_value"})
