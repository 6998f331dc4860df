"""The picture of a head of cross-attention: target down, source across, each with its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, VIRIDIS, scale
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

MOST_EXACT = 1 << 20  # cells
_LABELS, _DOWN = 60, 30  # along an axis, and down


def cross_map(
    trace: AttentionTrace, layer: int, head: int, meta: dict[str, object], **look: Unpack[Look]
) -> go.Figure:
    """Probabilities of a head of cross-attention, exact where q and k were kept, else block mass.

    The line goes through the strongest key of each token of the target. A sound has its time in seconds.
    """
    seconds = trace.attrs.get("seconds_per_position")
    small = trace.queries * trace.length <= MOST_EXACT
    if small and not trace.tile_refusal(layer, head):
        values = trace.tile(layer, head, (0, trace.queries), (0, trace.length))
        rows, columns = np.arange(trace.queries), np.arange(trace.length)
        what = ""  # the bar of colours says probability
    else:
        data, size = trace.select((layer, head)), trace.attrs["block_size"]
        values = data["block_mass"].values
        rows, columns = (np.arange(n) * size + (size - 1) / 2 for n in values.shape)
        what = f", block mass, {size} tokens a cell"
    step = 1 if seconds is None else seconds
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32),
            x=columns * step,
            y=rows,
            zmin=0,
            colorscale=scale(VIRIDIS),
            colorbar={"title": {"text": "probability", "side": "right"}, "thickness": 12},
            hovertemplate="target %{y}, source %{x}: %{z:.3g}<extra></extra>",
        )
    )
    if "strongest" in trace.dataset:
        places = trace.select((layer, head))["strongest"].values
        figure.add_scatter(
            x=places * step,
            y=np.arange(trace.queries),
            mode="lines+markers",
            line={"color": ACCENT, "width": 1},
            marker={"size": 4},
            name="strongest key",
            text=[escaped(trace.tokens[int(place)]) for place in places],
            hovertemplate="target %{y}: %{text}<extra></extra>",
        )
    down, across = ("place", "text") if trace.attrs.get("latents") else ("target", "source")
    figure.update_yaxes(title=down, autorange="reversed", **_named(trace.query_tokens, _DOWN))
    if seconds is None:
        figure.update_xaxes(title=across, tickangle=-60, **_named(trace.tokens))
    else:
        figure.update_xaxes(title="source (seconds)")
    title = f"L{layer}H{head}: cross-attention{what}"
    return style(figure, title, look, meta=meta)


def over_time(
    trace: AttentionTrace, values: np.ndarray, title: str, meta: dict[str, object], look: Look
) -> go.Figure:
    """What each moment of a sound gets, [keys], along the seconds, beside uniform attention."""
    seconds = np.arange(trace.length) * trace.attrs["seconds_per_position"]
    figure = go.Figure(
        go.Scatter(
            x=seconds,
            y=values.astype(np.float32),
            mode="lines",
            line={"color": ACCENT, "width": 1, "shape": "hvh"},
            fill="tozeroy",
            name="attention",
            hovertemplate="%{x:.2f} s: %{y:.3g}<extra></extra>",
        )
    )
    figure.add_hline(y=1 / trace.length, line={"color": BASELINE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="source (seconds); dotted: uniform attention")
    figure.update_yaxes(title="probability", rangemode="tozero")
    return style(figure, title, look, height=260, meta=meta)


def _named(tokens: list[str], most: int = _LABELS) -> dict[str, Any]:
    """Ticks with tokens, some of them where they are many."""
    at = np.arange(0, len(tokens), -(-len(tokens) // most))
    return {"tickvals": at, "ticktext": [escaped(tokens[place]) for place in at], "showgrid": False}
