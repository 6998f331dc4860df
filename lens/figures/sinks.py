"""Figures of sinks: by head, over epsilon, over positions. They take results of `lens.sinks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.style import Look, escaped, style, tick_step

if TYPE_CHECKING:
    from lens.sinks.detection.positions import SinkKeys, SinkProfile
    from lens.sinks.detection.rates import SinkCurve, SinkRate


@draws("SinkRate")
def alpha_grid(result: SinkRate, **look: Unpack[Look]) -> go.Figure:
    """Mean alpha of one key in every head: layers down, heads across; rate on hover."""
    text = f"Key {result.key}: sink rate {result.value:.3f} at ε = {result.epsilon}"
    return grid(
        result.alpha,
        escaped(f"{text} ({result.samples})"),
        look,
        unit="alpha",
        layers=result.layers,
        most=1,
        data=result.by_head,
        hover="alpha %{z:.3f}<br>rate %{customdata:.3f}",
    )


@draws("SinkCurve")
def epsilon_curve(result: SinkCurve, **look: Unpack[Look]) -> go.Figure:
    """Sink rate over epsilon, with its 95 % interval where there is one."""
    known = ~np.isnan(result.low)
    error = {
        "type": "data",
        "symmetric": False,
        "array": np.where(known, result.high - result.values, 0),
        "arrayminus": np.where(known, result.values - result.low, 0),
    }
    figure = go.Figure(
        go.Scatter(
            x=result.epsilons,
            y=result.values,
            error_y=error if known.any() else None,
            name="sink rate",
            mode="lines+markers",
            cliponaxis=False,
            line={"color": ACCENT},
            hovertemplate="ε %{x}<br>rate %{y:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="ε", range=[0, 1])
    figure.update_yaxes(title="Sink rate (share of layers × heads)", range=[0, 1.02])
    return style(figure, escaped(f"Key {result.of.key} ({result.of.samples})"), look)


@draws("SinkProfile")
def position_map(result: SinkProfile, **look: Unpack[Look]) -> go.Figure:
    """Mean alpha over a layer's heads: layers down, positions across; blank where not scored."""
    figure = go.Figure(
        go.Heatmap(
            z=result.alpha.mean(1),
            y=list(result.layers),
            colorscale=scale(VIRIDIS),
            zmin=0,
            zmax=1,
            colorbar={"title": "alpha"},
            hovertemplate="layer %{y}, key %{x}<br>alpha %{z:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="Key position")
    figure.update_yaxes(title="Layer", dtick=tick_step(len(result.layers)), autorange="reversed")
    return style(figure, escaped(f"Attention received by position ({result.samples})"), look)


@draws("SinkKeys")
def sink_map(result: SinkKeys, **look: Unpack[Look]) -> go.Figure:
    """The sinks of all prompts as points: position across, layer down, coloured by alpha."""
    rows, profile = result.rows, result.profile
    figure = go.Figure(
        go.Scatter(
            x=rows["key"],
            y=rows["layer"],
            mode="markers",
            marker={
                "color": rows["alpha"],
                "colorscale": scale(VIRIDIS),
                "cmin": 0,
                "cmax": 1,
                "showscale": True,
                "colorbar": {"title": "alpha"},
            },
            text=[
                f"{name}: {escaped(token)}"
                for name, token in zip(rows["name"], rows["token"], strict=True)
            ],
            customdata=rows[["alpha", "prompt"]],
            hovertemplate=(
                "%{text}<br>key %{x} of prompt %{customdata[1]}<br>alpha %{customdata[0]:.3f}<extra></extra>"
            ),
        )
    )
    figure.update_xaxes(title="Key position", range=[-0.5, profile.samples.tokens - 0.5])
    figure.update_yaxes(
        title="Layer", dtick=tick_step(rows["layer"].nunique()), autorange="reversed"
    )
    return style(figure, escaped(f"Keys with alpha > {profile.epsilon} ({profile.samples})"), look)
