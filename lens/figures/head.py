"""Figures of one head on one prompt, from its trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from lens.errors import LensError
from lens.figures.colors import ACCENT, BASELINE, LINE, VIRIDIS, scale
from lens.figures.style import Theme, style

if TYPE_CHECKING:
    import xarray as xr

    from lens.trace import AttentionTrace

MOST_POINTS = 2000
MOST_CELLS = 256


def _head(trace: AttentionTrace, layer: int, head: int) -> xr.Dataset:
    for name, value, count in (("layer", layer, trace.layers), ("head", head, trace.heads)):
        if not 0 <= value < count:
            raise LensError(f"{name} must be 0 to {count - 1} in {trace.model}, got {value}")
    return trace.dataset.isel(layer=layer, head=head)


def _thin(
    values: np.ndarray, reduce: Callable[..., np.ndarray] = np.nanmean
) -> tuple[np.ndarray, int]:
    """Equal bins, reduced, where there are more points than a screen shows; and the bin's size."""
    size = -(-len(values) // MOST_POINTS)
    if size == 1:
        return values, 1
    padded = np.pad(values, (0, -len(values) % size), constant_values=np.nan)
    return reduce(padded.reshape(-1, size), axis=1), size


def _meta(trace: AttentionTrace, layer: int, head: int) -> dict[str, object]:
    return {"model": trace.model, "layer": layer, "head": head, "tokens": trace.length}


def distance_profile(
    trace: AttentionTrace,
    layer: int,
    head: int,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Mean attention at each distance `query - key`, beside that of a uniform causal head.

    The mean is over the queries that have a key at that distance.
    """
    data = _head(trace, layer, head)
    offset = data["offset"].values
    rows = np.maximum(trace.length - np.abs(offset), 1)
    mean = data["diagonal"].values / rows
    causal, length = trace.attrs["causal"], trace.length
    if causal:
        uniform = _uniform_causal(length) / rows
    else:
        uniform = np.full(len(offset), 1 / length)
    hover = "distance %{x}: %{y:.4g}<extra></extra>"
    figure = go.Figure(
        [
            go.Scatter(
                x=offset, y=mean, mode="lines", name=f"L{layer}H{head}",
                line={"color": LINE, "width": 1.5}, hovertemplate=hover,
            ),
            go.Scatter(
                x=offset, y=uniform, mode="lines", name="uniform attention",
                line={"color": BASELINE, "width": 1, "dash": "dot"}, hovertemplate=hover,
            ),
        ]
    )  # fmt: skip
    figure.update_xaxes(title="distance query - key (tokens)")
    figure.update_yaxes(title="mean probability", type="log", dtick=1, exponentformat="power")
    mass = data["diagonal"].values
    best = int(np.argmax(mass))
    found = (
        f"L{layer}H{head}: most at distance {offset[best]}, {mass[best] / mass.sum():.1%} of all"
    )
    return style(
        figure, title=title or found, width=width, height=height, theme=theme,
        meta=_meta(trace, layer, head),
    )  # fmt: skip


def _uniform_causal(length: int) -> np.ndarray:
    """Column sums by distance of uniform causal attention: sum over rows i >= d of 1 / (i + 1)."""
    harmonic = np.cumsum(1 / np.arange(1, length + 1))
    return harmonic[-1] - np.concatenate([[0.0], harmonic[:-1]])


def row_entropy(
    trace: AttentionTrace,
    layer: int,
    head: int,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Entropy of every row, with and without the first key, below the largest possible one."""
    data = _head(trace, layer, head)
    raw, size = _thin(data["entropy"].values)
    position = np.arange(len(raw)) * size
    visible = np.arange(1, trace.length + 1) if trace.attrs["causal"] else trace.length
    largest, _ = _thin(np.log(np.broadcast_to(visible, trace.length)).astype(float))
    lines = [
        go.Scatter(
            x=position, y=largest, mode="lines", name="uniform attention",
            line={"color": BASELINE, "width": 1, "dash": "dot"},
        ),
        go.Scatter(x=position, y=raw, mode="lines", name="raw", line={"color": LINE, "width": 1.5}),
    ]  # fmt: skip
    if "entropy_sink_excluded" in data:
        without, _ = _thin(data["entropy_sink_excluded"].values)
        lines.append(
            go.Scatter(
                x=position, y=without, mode="lines", name="sink excluded",
                line={"color": ACCENT, "width": 1.5},
            )
        )  # fmt: skip
    figure = go.Figure(lines)
    figure.update_traces(hovertemplate="query %{x}: %{y:.3f} nats<extra></extra>")
    figure.update_xaxes(title="query position" + (f" (means of {size})" if size > 1 else ""))
    figure.update_yaxes(title="row entropy (nats)", rangemode="tozero")
    mean = float(np.nanmean(data["entropy"].values[1:])) if trace.length > 1 else 0.0
    found = f"L{layer}H{head}: mean row entropy {mean:.2f} nats"
    return style(
        figure, title=title or found, width=width, height=height, theme=theme,
        meta=_meta(trace, layer, head),
    )  # fmt: skip


def received_mass(
    trace: AttentionTrace,
    layer: int,
    head: int,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """alpha of every key: mean attention from the queries that see it, beside uniform attention."""
    data = _head(trace, layer, head)
    visible = data["visible"].values
    alpha, size = _thin(data["received"].values / visible, np.nanmax)  # a sink is one key
    position = np.arange(len(alpha)) * size
    rows = np.arange(1, trace.length + 1)
    full = (1 / rows)[::-1].cumsum()[::-1] / visible if trace.attrs["causal"] else 1 / visible
    uniform, _ = _thin(full, np.nanmax)
    tokens = [trace.tokens[i] for i in position]
    figure = go.Figure(
        [
            go.Scatter(
                x=position, y=alpha, mode="lines", name=f"L{layer}H{head}", text=tokens,
                line={"color": LINE, "width": 1.5},
                hovertemplate="key %{x} %{text}: %{y:.4g}<extra></extra>",
            ),
            go.Scatter(
                x=position, y=uniform, mode="lines", name="uniform attention",
                line={"color": BASELINE, "width": 1, "dash": "dot"}, hoverinfo="skip",
            ),
        ]
    )  # fmt: skip
    figure.update_xaxes(title="key position" + (f" (largest of {size})" if size > 1 else ""))
    figure.update_yaxes(title="mean over the queries that see it", rangemode="tozero")
    first = float(data["received"].values[0] / visible[0])
    found = f"L{layer}H{head}: the first token receives {first:.1%}"
    return style(
        figure, title=title or found, width=width, height=height, theme=theme,
        meta=_meta(trace, layer, head),
    )  # fmt: skip


def block_map(
    trace: AttentionTrace,
    layer: int,
    head: int,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Block mass on a log scale, max-pooled to at most 256 × 256 cells; the title says so."""
    data = _head(trace, layer, head)["block_mass"].values
    step = -(-len(data) // MOST_CELLS)
    if step > 1:
        edges = np.arange(0, len(data), step)
        data = np.maximum.reduceat(np.maximum.reduceat(data, edges, 0), edges, 1)
    shown = np.where(data > 0, np.log10(np.maximum(data, 1e-6)), np.nan)
    if trace.attrs["causal"]:
        shown = np.where(np.tri(len(shown), dtype=bool), shown, np.nan)
    size = trace.attrs["block_size"] * step
    start = np.arange(len(shown)) * size
    figure = go.Figure(
        go.Heatmap(
            z=shown.astype(np.float32), x=start, y=start, zmin=-6, zmax=0,
            colorscale=scale(VIRIDIS), hoverongaps=False,
            colorbar={
                "title": {"text": "block mass", "side": "right"}, "thickness": 12,
                "tickvals": [-6, -4, -2, 0], "ticktext": ["≤ 1e-6", "1e-4", "0.01", "1"],
            },
            hovertemplate="queries from %{y}, keys from %{x}: 10^%{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="key", constrain="domain", showgrid=False)
    figure.update_yaxes(title="query", autorange="reversed", scaleanchor="x", showgrid=False)
    pooled = f", largest of {step} × {step} blocks" if step > 1 else ""
    found = f"L{layer}H{head}: block mass, {size} tokens a cell{pooled}"
    return style(
        figure, title=title or found, width=width, height=height, theme=theme,
        meta=_meta(trace, layer, head) | {"pooled": step},
    )  # fmt: skip
