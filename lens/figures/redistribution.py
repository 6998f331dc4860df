"""Figures of redistribution: heads that were chosen, sink dimensions, images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, DIVERGING, GRID, INK, LINE, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.edits.searching import HeadSearch
    from lens.edits.selection import HeadSelection
    from lens.sinks.activations.dims import SinkDims
    from lens.sinks.activations.dims_agreement import DimsAgreement
    from lens.vision.distances import PatchDistances
    from lens.vision.images import ImageGrid

_KINDS = {"system": BASELINE, "image": ACCENT, "text": LINE, "padding": GRID}


@draws("HeadSelection")
def selection_grid(result: HeadSelection, **look: Unpack[Look]) -> go.Figure:
    """Share of image-centric rows in every head; blank where a head could not be edited."""
    return grid(
        result.share,
        escaped(f"Image-centric rows by head ({result.model})"),
        look,
        unit="share",
        most=1,
        data=np.stack([result.selected, result.text], -1),
        hover="%{customdata[0]} of %{customdata[1]} rows (%{z:.3f})",
    )


@draws("SinkDims")
def sink_dim_lines(result: SinkDims, **look: Unpack[Look]) -> go.Figure:
    """Largest size of each sink dimension over the layers, and the bound tau."""
    figure = go.Figure()
    layers = list(range(len(result.largest)))
    for dim in result.dims:
        figure.add_scatter(
            x=layers, y=result.largest[:, dim], name=f"dim {dim}", mode="lines+markers"
        )
    others = np.delete(result.largest, list(result.dims), axis=1)
    if others.size:
        figure.add_scatter(
            x=layers, y=others.max(1), name="largest of the others", line={"dash": "dot"}
        )
    figure.add_hline(y=result.tau, line={"color": ACCENT, "dash": "dash"}, annotation_text="τ")
    figure.update_xaxes(title="Layer that it enters")
    figure.update_yaxes(title="|x| / RMS", rangemode="tozero")
    text = f"Sink dimensions of {result.model} ({result.counted} tokens)"
    return style(figure, escaped(text), look)


@draws("DimsAgreement")
def agreement_lines(result: DimsAgreement, **look: Unpack[Look]) -> go.Figure:
    """Precision and recall of sink dimensions in each layer, beside the base rate; gaps: none marked."""
    rows = result.table()
    figure = go.Figure()
    for name, color in (("precision", ACCENT), ("recall", LINE), ("base_rate", BASELINE)):
        figure.add_scatter(
            x=rows["layer"],
            y=rows[name],
            name=name.replace("_", " "),
            mode="lines+markers",
            line={"color": color, "dash": "dot" if name == "base_rate" else "solid"},
            customdata=rows[["both", "marked", "received"]],
            hovertemplate=(
                "layer %{x}: %{y:.3f}<br>%{customdata[0]} of %{customdata[1]} marked and "
                "%{customdata[2]} most looked at"
            ),
        )
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Share of tokens", range=[-0.02, 1.02])
    text = f"φ ≥ {result.tau:g} against the {result.received.mean():.1%} that receive most ({result.model})"
    return style(figure, escaped(text), look)


@draws("ImageGrid")
def image_grid(result: ImageGrid, **look: Unpack[Look]) -> go.Figure:
    """The tokens of one image where they lie; marked ones with a cross."""
    figure = go.Figure(
        go.Heatmap(
            z=result.values,
            colorscale=scale(VIRIDIS),
            colorbar={"title": escaped(result.name)},
            hovertemplate="row %{y}, column %{x}<br>%{z:.4g}<extra></extra>",
        )
    )
    if result.marked is not None:
        rows, columns = np.nonzero(result.marked)
        figure.add_scatter(
            x=columns,
            y=rows,
            mode="markers",
            marker={"symbol": "x-thin", "size": 10, "line": {"color": ACCENT, "width": 2}},
            hoverinfo="skip",
            name="marked",
        )
    figure.update_xaxes(title="Column", constrain="domain")
    figure.update_yaxes(title="Row", autorange="reversed", scaleanchor="x")
    text = f"Image {result.image}: {result.name}"
    if not np.isnan(result.enrichment):
        text += f"; marked in the region {result.rate:.1%}, all tokens {result.base_rate:.1%}"
    return style(figure, escaped(text), look)


@draws("PatchDistances")
def patch_distances(result: PatchDistances, **look: Unpack[Look]) -> go.Figure:
    """How much farther every head looks than uniform attention in its layer, layers down, heads across; white is as far."""
    beyond = result.distance - result.uniform_distance[:, None]
    reach = float(np.nanmax(np.abs(beyond), initial=0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=beyond,
            y=[f"L{layer}" for layer in result.layers],
            zmin=-reach,
            zmax=reach,
            customdata=result.distance,
            colorscale=scale(DIVERGING),
            colorbar={"title": "patches"},
            hovertemplate="%{y}H%{x}<br>%{customdata:.3g} patches, %{z:+.3g} beyond uniform<extra></extra>",
        )
    )
    figure.update_xaxes(title="Head")
    figure.update_yaxes(title="Layer", autorange="reversed")
    text = f"How far heads look beyond uniform attention ({result.uniform_distance.mean():.2f} patches)"
    return style(figure, text, look)


@draws("Segments", of="table")
def segment_bars(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """What the tokens of each prompt are, one bar of stretches per prompt.

    Args:
        table: of `Segments`.
    """
    figure = go.Figure()
    for kind, color in _KINDS.items():
        rows = table[table["kind"] == kind]
        if not len(rows):
            continue
        figure.add_bar(
            x=rows["tokens"],
            base=rows["start"],
            y=[f"prompt {prompt}" for prompt in rows["prompt"]],
            orientation="h",
            name=kind,
            marker={"color": color},
            hovertemplate=f"{kind}<br>from token %{{base}}, %{{x}} tokens<extra>%{{y}}</extra>",
        )
    figure.update_layout(barmode="overlay", showlegend=True)
    figure.update_xaxes(title="Token")
    figure.update_yaxes(autorange="reversed")
    return style(figure, "Tokens by kind", look)


@draws("HeadSearch")
def gain_grid(result: HeadSearch, **look: Unpack[Look]) -> go.Figure:
    """Mean gain of editing each head alone on the validation prompts; chosen heads with a cross."""
    gains = result.gains.mean(-1)
    text = f"Gain in {result.metric} on {result.task} (validation; test {result.test.mean():.3g})"
    meta = {"task": result.task, "metric": result.metric}
    figure = grid(gains, escaped(text), look, unit="gain", signed=True, meta=meta)
    return figure.add_scatter(
        x=[head for _, head in result.chosen],
        y=[layer for layer, _ in result.chosen],
        mode="markers",
        marker={"symbol": "x-thin", "size": 10, "line": {"color": INK, "width": 2}},
        hoverinfo="skip",
        name="chosen",
    )
