"""The figure of `lens.circuits.scores.hisp`: scores of queries, keys, values and MLPs by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.colors import VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.style import Look, escaped, style, tick_step

if TYPE_CHECKING:
    from lens.circuits.scores._hisp import GateScores


@draws("GateScores")
def gate_map(scores: GateScores, **look: Unpack[Look]) -> go.Figure:
    """Layers down, nodes of a layer across: all queries, all keys, all values, the MLP."""
    layers = scores.graph.layers
    values = scores.values.reshape(layers, -1)
    names = [name.partition(".")[2] or "mlp" for name in scores.nodes[: values.shape[1]]]
    unit = "normalised by layer" if scores.normalized else f"slope of {scores.metric}"
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=names,
            colorscale=scale(VIRIDIS),
            zmin=0,
            colorbar={"title": unit},
            hovertemplate="layer %{y}, %{x}: %{z:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="gate", type="category")
    figure.update_yaxes(title="layer", autorange="reversed", dtick=tick_step(layers))
    best = scores.nodes[int(scores.values.argmax())]
    return style(
        figure,
        f"hisp on {escaped(scores.task)}: most through {best}",
        look,
        meta={"figure": "gate_map", "task": scores.task, "model": scores.model},
    )
