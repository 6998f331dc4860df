"""Figures of sinks: by head, over epsilon, over positions. They take results of `lens.sinks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.errors import LensError
from lens.figures.colors import ACCENT, BASELINE, LINE, VIRIDIS, scale
from lens.figures.style import Theme, escaped, style

if TYPE_CHECKING:
    from lens.sinks import SinkKeys, SinkProfile, SinkRate, SinkSensitivity

_CONDITIONS = (ACCENT, LINE, BASELINE, "#22a884")
_MEASURES = {
    "delta_loss": "Change of loss (nats per token)",
    "kl": "KL of the edited from the unedited prediction (nats)",
    "flip_rate": "Share of changed top tokens",
    "excess": "Change of loss beyond the control's (nats per token)",
}


def alpha_grid(
    result: SinkRate,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Mean alpha of one key in every head: layers down, heads across; rate on hover."""
    figure = go.Figure(
        go.Heatmap(
            z=result.alpha,
            y=list(result.layers),
            customdata=result.by_head,
            colorscale=scale(VIRIDIS),
            zmin=0,
            zmax=1,
            colorbar={"title": "alpha"},
            hovertemplate="L%{y}H%{x}<br>alpha %{z:.3f}<br>rate %{customdata:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="Head", dtick=1)
    figure.update_yaxes(title="Layer", dtick=1, autorange="reversed")
    text = f"Key {result.key}: sink rate {result.value:.3f} at ε = {result.epsilon}"
    return style(
        figure,
        title=title or escaped(f"{text} ({result.samples})"),
        width=width,
        height=height,
        theme=theme,
    )


def epsilon_curve(
    result: SinkSensitivity,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
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
            mode="lines+markers",
            line={"color": ACCENT},
            hovertemplate="ε %{x}<br>rate %{y:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="ε", range=[0, 1])
    figure.update_yaxes(title="Sink rate (share of layers × heads)", range=[0, 1.02])
    return style(
        figure,
        title=title or escaped(f"Key {result.key} ({result.samples})"),
        width=width,
        height=height,
        theme=theme,
    )


def position_map(
    result: SinkProfile,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
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
    figure.update_yaxes(title="Layer", dtick=1, autorange="reversed")
    return style(
        figure,
        title=title or escaped(f"Attention received by position ({result.samples})"),
        width=width,
        height=height,
        theme=theme,
    )


def sink_map(
    result: SinkKeys,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """The sinks of one prompt as points: position across, layer down, coloured by alpha."""
    figure = go.Figure(
        go.Scatter(
            x=result.key,
            y=result.layer,
            mode="markers",
            marker={
                "color": result.alpha,
                "colorscale": scale(VIRIDIS),
                "cmin": 0,
                "cmax": 1,
                "showscale": True,
                "colorbar": {"title": "alpha"},
            },
            text=[
                f"L{layer}H{head}: {escaped(token)}"
                for layer, head, token in zip(result.layer, result.head, result.token, strict=True)
            ],
            customdata=result.alpha,
            hovertemplate="%{text}<br>key %{x}<br>alpha %{customdata:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="Key position", range=[-0.5, result.samples.tokens - 0.5])
    figure.update_yaxes(title="Layer", dtick=1, autorange="reversed")
    return style(
        figure,
        title=title or escaped(f"Keys with alpha > {result.epsilon} ({result.samples})"),
        width=width,
        height=height,
        theme=theme,
    )


def dose_curves(
    table: pd.DataFrame,
    measure: str = "delta_loss",
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """One measure over the amount of an edit, a curve per condition, with 95 % intervals.

    Args:
        table: of `lens.sinks.DoseResponse`.
        measure: "delta_loss", "kl", "flip_rate" or "excess".

    Raises:
        LensError: an unknown measure.
    """
    if measure not in _MEASURES:
        raise LensError(f"measure must be one of {', '.join(_MEASURES)}, got {measure!r}")
    figure = go.Figure()
    for color, (condition, rows) in zip(
        _CONDITIONS, table.groupby("condition", sort=False), strict=False
    ):
        if rows[measure].isna().all():
            continue
        above, below = (
            rows[f"{measure}_high"] - rows[measure],
            rows[measure] - rows[f"{measure}_low"],
        )
        figure.add_scatter(
            x=rows["amount"],
            y=rows[measure],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": above.fillna(0),
                "arrayminus": below.fillna(0),
            },
            mode="lines+markers",
            line={"color": color},
            name=str(condition),
            customdata=rows["mass"],
            hovertemplate="amount %{x}<br>%{y:.4f}<br>mass of the keys %{customdata:.3f}",
        )
    figure.update_xaxes(title="Amount")
    figure.update_yaxes(title=_MEASURES[measure])
    first = table.iloc[0]
    text = f"Edit {first['edit']} (BOS {first['bos']}, n = {first['n']})"
    return style(figure, title=title or text, width=width, height=height, theme=theme)
