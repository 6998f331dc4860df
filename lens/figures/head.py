"""Figures of one head on one prompt, from its trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.plots import draws
from lens.figures import uniform
from lens.figures.cross import cross_map
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    import xarray as xr

    from lens.traces.trace import AttentionTrace

MOST_POINTS = 2000
MOST_CELLS = 256
MOST_NAMED = 64  # tokens that have room for their names on an axis
FLOOR = 1e-6
"""Logarithmic axes and colours end here."""
_KEPT = ("revision", "text_sha256", "dtype", "backend", "block_size", "seed")


def distance_profile(
    trace: AttentionTrace, layer: int, head: int, **look: Unpack[Look]
) -> go.Figure:
    """Mean attention at each distance `query - key`, beside that of uniform attention.

    The mean is over the queries that have a key at that distance; in a layer with a sliding window
    only the distances within it are drawn.

    Example:
        >>> lens.figures.distance_profile(trace, 1, 0).layout.title.text
        'L1H0: most at distance 4, 5.9% of all mass'
    """
    data = head_data(trace, layer, head, "diagonal")
    window = trace.window(layer)
    offset, mass = data["offset"].values, data["diagonal"].values
    within = np.abs(offset) < (trace.length if window is None else window)
    offset, mass = offset[within], mass[within]
    mean = mass / (trace.length - np.abs(offset))
    at, size = _peaks(mean)
    lines = [_line(offset[at], _positive(mean[at]), f"L{layer}H{head}", LINE)]
    if trace.has_plain_mask(layer):
        even = uniform.by_distance(
            offset, trace.length, causal=trace.attrs["causal"], window=window
        )
        lines.append(_baseline(offset[at], even[at]))
    figure = go.Figure(lines)
    figure.update_traces(hovertemplate="distance %{x}: %{y:.4g}<extra></extra>")
    figure.update_xaxes(title="distance query - key (tokens)" + _binned(size))
    lowest = np.log10(max(mean[mean > 0].min(initial=1.0), FLOOR))
    figure.update_yaxes(
        title="mean probability",
        type="log",
        dtick=1,
        exponentformat="power",
        range=[lowest - 0.1, 0.1],
    )
    best, total = int(np.argmax(mass)), mass.sum()
    found = (
        f"L{layer}H{head}: most at distance {offset[best]}, {mass[best] / total:.1%} of all mass"
        if total > 0
        else f"L{layer}H{head}: no attention at all"
    )
    return style(figure, found, look, meta=provenance(trace, layer, head, "distance_profile"))


def row_entropy(trace: AttentionTrace, layer: int, head: int, **look: Unpack[Look]) -> go.Figure:
    """Entropy of every row, with and without the first key, below the largest possible one.

    The mean in the title leaves out the first row of a causal mask, which sees one key.

    Example:
        >>> lens.figures.row_entropy(trace, 1, 0).layout.title.text
        'L1H0: mean row entropy 0.54 nats'
    """
    data = head_data(trace, layer, head, "entropy")
    raw, size = _means(data["entropy"].values)
    position = np.arange(len(raw)) * size
    lines = []
    if trace.has_plain_mask(layer):
        seen = np.full(trace.queries, trace.length)
        if not trace.cross:
            seen = uniform.keys_seen(
                trace.length, causal=trace.attrs["causal"], window=trace.window(layer)
            )
        lines.append(_baseline(position, _means(np.log(seen))[0]))
    lines.append(_line(position, raw, "raw", LINE))
    if "entropy_sink_excluded" in data:
        rest = _means(data["entropy_sink_excluded"].values)[0]
        lines.append(_line(position, rest, "sink excluded", ACCENT))
    figure = go.Figure(lines)
    figure.update_traces(hovertemplate="query %{x}: %{y:.3f} nats<extra></extra>")
    figure.update_xaxes(title="query position" + (f" (means of {size})" if size > 1 else ""))
    figure.update_yaxes(title="row entropy (nats)", rangemode="tozero")
    later = data["entropy"].values[int(bool(trace.attrs["causal"])) :]
    found = f"L{layer}H{head}: mean row entropy {later.mean() if len(later) else 0.0:.2f} nats"
    return style(figure, found, look, meta=provenance(trace, layer, head, "row_entropy"))


def received_mass(trace: AttentionTrace, layer: int, head: int, **look: Unpack[Look]) -> go.Figure:
    """alpha of every key: mean attention from the queries that see it, beside uniform attention.

    Example:
        >>> lens.figures.received_mass(trace, 1, 0).layout.title.text
        'L1H0: the first token receives 86.9%'
    """
    data = head_data(trace, layer, head, "received")
    visible = data["visible"].values
    alpha = data["received"].values / np.where(visible > 0, visible, np.nan)
    at, size = _peaks(alpha)
    tokens = trace.tokens
    own = _line(at, alpha[at], f"L{layer}H{head}", LINE)
    own.update(
        text=[escaped(tokens[position]) for position in at],
        hovertemplate="key %{x} %{text}: %{y:.4g}<extra></extra>",
    )
    lines = [own]
    if trace.has_plain_mask(layer):
        even = np.full(trace.length, 1 / trace.length)
        if not trace.cross:
            even = uniform.received(
                trace.length, causal=trace.attrs["causal"], window=trace.window(layer)
            )
        lines.append(_baseline(at, even[at]))
    figure = go.Figure(lines)
    figure.update_xaxes(title="key position" + _binned(size))
    figure.update_yaxes(title="mean probability received", rangemode="tozero")
    found = f"L{layer}H{head}: the first token receives {alpha[0]:.1%}"
    return style(figure, found, look, meta=provenance(trace, layer, head, "received_mass"))


@draws("AttentionTrace")
def block_map(trace: AttentionTrace, layer: int, head: int, **look: Unpack[Look]) -> go.Figure:
    """Attention on a log scale: of single tokens where q and k were kept and at most 256 tokens stand on a side, with
    their names up to 64; else block mass, max-pooled to at most 256 × 256 cells. The title says which.

    Of cross-attention the probabilities themselves where q and k were kept, with the tokens of both sides.

    Example:
        >>> lens.figures.block_map(trace, 1, 0).layout.title.text
        'L1H0: attention, one token a cell'
    """
    if given_as("AttentionTrace", trace=trace).cross:
        return cross_map(trace, layer, head, provenance(trace, layer, head, "block_map"), **look)
    exact = trace.length <= MOST_CELLS and not trace.tile_refusal(layer, head)
    step = 1
    if exact:
        trace.head_id((layer, head))
        data = trace.tile(layer, head, (0, trace.length), (0, trace.length))
    else:
        data = head_data(trace, layer, head, "block_mass")["block_mass"].values
        step = -(-len(data) // MOST_CELLS)
    if step > 1:
        first = np.arange(0, len(data), step)
        data = np.maximum.reduceat(np.maximum.reduceat(data, first, 0), first, 1)
    shown = np.where(data > 0, np.log10(np.maximum(data, FLOOR)), np.nan)
    if trace.attrs["causal"]:
        shown = np.where(np.tri(len(shown), dtype=bool), shown, np.nan)
    size = 1 if exact else trace.attrs["block_size"] * step
    edges = np.minimum(np.arange(len(shown) + 1) * size, trace.length)
    figure = go.Figure(
        go.Heatmap(
            z=shown.astype(np.float32),
            x=edges,
            y=edges,
            zmin=np.log10(FLOOR),
            zmax=0,
            colorscale=scale(VIRIDIS),
            hoverongaps=False,
            colorbar={
                "title": {"text": "probability" if exact else "block mass", "side": "right"},
                "thickness": 12,
                "tickvals": [-6, -4, -2, 0],
                "ticktext": ["≤ 1e-6", "1e-4", "0.01", "1"],
            },
            hovertemplate="queries round %{y:.0f}, keys round %{x:.0f}: 10^%{z:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="key", constrain="domain", showgrid=False)
    figure.update_yaxes(title="query", autorange="reversed", scaleanchor="x", showgrid=False)
    if exact and trace.length <= MOST_NAMED:
        names = {
            "tickvals": list(np.arange(trace.length) + 0.5),
            "ticktext": [escaped(token) for token in trace.tokens],
        }
        figure.update_xaxes(**names, tickangle=-90, tickfont={"size": 9})
        figure.update_yaxes(**names, tickfont={"size": 9})
    pooled = f", largest of {step} × {step} blocks" if step > 1 else ""
    what = "attention, one token a cell" if exact else f"block mass, {size} tokens a cell{pooled}"
    return style(
        figure,
        f"L{layer}H{head}: {what}",
        look,
        meta=provenance(trace, layer, head, "block_map") | {"pooled": step},
    )


def head_data(trace: AttentionTrace, layer: int, head: int, needed: str) -> xr.Dataset:
    """The variables of one head, of which one must be there."""
    data = given_as("AttentionTrace", trace=trace).select((layer, head))
    if needed not in data:
        raise LensError(
            f"this trace has no {needed}; capture it with statistics including {needed!r}"
        )
    return data


def provenance(trace: AttentionTrace, layer: int, head: int, figure: str) -> dict[str, object]:
    """Provenance: which figure of which head, prompt and model."""
    attributes = trace.attrs
    return {
        "figure": figure,
        "model": trace.model,
        "layer": layer,
        "head": head,
        "tokens": trace.length,
        "versions": attributes.get("versions", {}),
        **{name: attributes[name] for name in _KEPT if name in attributes},
    }


def _line(x: np.ndarray, y: np.ndarray, name: str, color: str) -> go.Scatter:
    return go.Scatter(x=x, y=y, mode="lines", name=name, line={"color": color, "width": 1.5})


def _baseline(x: np.ndarray, y: np.ndarray) -> go.Scatter:
    dotted = {"color": BASELINE, "width": 1, "dash": "dot"}
    return go.Scatter(x=x, y=y, mode="lines", name="uniform attention", line=dotted)


def _means(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Means of equal bins where there are more points than a screen shows; and the bin's size."""
    size = -(-len(values) // MOST_POINTS)
    if size == 1:
        return values, 1
    padded = np.pad(values.astype(float), (0, -len(values) % size), constant_values=np.nan)
    return np.nanmean(padded.reshape(-1, size), axis=1), size


def _peaks(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Where the largest value of each equal bin lies, since a sink is one key; and the bin's size."""
    size = -(-len(values) // MOST_POINTS)
    filled = np.nan_to_num(values, nan=-np.inf).astype(float)
    padded = np.pad(filled, (0, -len(values) % size), constant_values=-np.inf).reshape(-1, size)
    return np.arange(len(padded)) * size + padded.argmax(1), size


def _binned(size: int) -> str:
    return f" (largest of {size})" if size > 1 else ""


def _positive(values: np.ndarray) -> np.ndarray:
    """NaN instead of 0, which a logarithmic axis cannot show."""
    return np.where(values > 0, values, np.nan)
