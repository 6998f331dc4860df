"""The figure of `lens.heads.pruning.curve`: what it costs to take heads away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE
from lens.common.plots import draws
from lens.figures.style import Look, band, escaped, style

if TYPE_CHECKING:
    from lens.heads.pruning.curves import PruningCurve
    from lens.heads.pruning.orders import PruningOrders


@draws("PruningCurve")
def pruning_plot(curve: PruningCurve, **look: Unpack[Look]) -> go.Figure:
    """Cost over the number of heads removed, with its interval and the range of random orders."""
    table = curve.table()
    x = table["removed"].to_numpy()
    figure = go.Figure()
    if len(curve.random):
        figure.add_trace(
            band(x, table["random_low"], table["random_high"], "rgba(138,143,152,0.25)")
        )
        figure.add_trace(
            go.Scatter(
                x=x,
                y=table["random_cost"],
                mode="lines",
                name=f"{len(curve.random)} random orders (mean and range)",
                line={"color": BASELINE, "dash": "dot"},
                hovertemplate="%{x} at random: %{y:.4g}<extra></extra>",
            )
        )
    if not np.isnan(table["low"]).any():
        figure.add_trace(band(x, table["low"], table["high"], "rgba(194,65,12,0.2)"))
    figure.add_trace(
        go.Scatter(
            x=x,
            y=table["cost"],
            mode="lines+markers",
            name=escaped(curve.ranking),
            text=table["name"],
            line={"color": ACCENT, "width": 2},
            marker={"size": 5},
            hovertemplate="%{x} removed, last %{text}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="heads removed")
    figure.update_yaxes(title=f"cost ({curve.metric})")
    return style(
        figure,
        _finding(curve),
        look,
        meta={
            "figure": "pruning_plot",
            "ranking": curve.ranking,
            "task": curve.task,
            "model": curve.model,
        },
    )


@draws("PruningOrders")
def orders_plot(found: PruningOrders, **look: Unpack[Look]) -> go.Figure:
    """Cost of the best order as `pruning_plot` shows it, and of the others as lines."""
    figure = pruning_plot(found.best, **look)
    for one in found.curves:
        if one is not found.best:
            figure.add_trace(
                go.Scatter(
                    x=one.removed,
                    y=one.cost.mean(1),
                    mode="lines",
                    name=escaped(one.ranking),
                    text=["", *map(str, (one.order[count - 1] for count in one.removed[1:]))],
                    hovertemplate="%{x} removed, last %{text}: %{y:.4g}<extra></extra>",
                )
            )
    return figure


def _finding(curve: PruningCurve) -> str:
    half = len(curve.removed) // 2
    cost = curve.cost.mean(1)[half]
    return (
        f"{curve.model}, {curve.task}: {curve.removed[half]} of {len(curve.order)} heads removed "
        f"cost {cost:.3g} ({curve.metric})"
    )
