"""What heads of a vision tower do with a picture: rings, shapes, receptive fields, trees, segments, flow and rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from lens.common.colors import ACCENT, BASELINE, LINE, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.pictures import picture_uri
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lens.traces.pictures import PatchGrid
    from lens.vision.coding import CodingRate
    from lens.vision.conserved import Flow
    from lens.vision.patterns import PatternSummary
    from lens.vision.receptive import ReceptiveField
    from lens.vision.rings import Rings, Shapes
    from lens.vision.structure import PatchSegments, PatchTree

_HEIGHT = 420


@draws("Rings")
def ring_profile(result: Rings, **look: Unpack[Look]) -> go.Figure:
    """Mass by ring, a line per layer (mean over heads), beside uniform attention.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.rings(trace).plot()
    """
    figure = go.Figure()
    colors = _along(len(result.layers))
    for place, layer in enumerate(result.layers):
        figure.add_scatter(
            y=result.mass[place].mean(0),
            name=f"layer {layer}",
            mode="lines+markers",
            line={"color": colors[place]},
            customdata=result.weight[place].mean(0),
            hovertemplate="ring %{x}: %{y:.4f}, %{customdata:.5f} a patch<extra>%{fullData.name}</extra>",
        )
    dotted = {"color": BASELINE, "dash": "dot"}
    figure.add_scatter(y=result.uniform.mean(0), name="uniform", mode="lines", line=dotted)
    figure.update_xaxes(title="Ring (patches from the one that looks; 0 is itself)")
    figure.update_yaxes(title="Attention (mean over heads)", rangemode="tozero")
    figure = style(figure, "Attention by distance on the picture", look, height=_HEIGHT)
    beside = {"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"}
    return figure.update_layout(legend=beside, margin_t=40)


@draws("Shapes")
def shape_shares(result: Shapes, **look: Unpack[Look]) -> go.Figure:
    """Every head's share of each shape, a column of points per shape, beside uniform attention.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.shapes(trace, window=2).plot()
    """
    table = result.table()
    names = [name for name in table.columns if f"{name}_uniform" in table.columns]
    figure = go.Figure()
    for name in names:
        figure.add_scatter(
            x=[name.replace("_", "-")] * len(table),
            y=table[name],
            mode="markers",
            marker={
                "color": table["layer"],
                "colorscale": scale(VIRIDIS),
                "size": 7,
                "opacity": 0.7,
            },
            text=table["name"],
            hovertemplate="%{text}: %{y:.3f}<extra></extra>",
            showlegend=False,
        )
    figure.add_scatter(
        x=[name.replace("_", "-") for name in names],
        y=result.uniform.mean(0),
        mode="markers",
        marker={"symbol": "line-ew", "size": 30, "line": {"color": ACCENT, "width": 2}},
        name="uniform attention",
    )
    figure.update_yaxes(title="Share of the attention on patches", range=[0, 1.02])
    text = f"Share by shape: windows of {result.window}, every {result.step}. row and column; darker is earlier"
    return style(figure, text, look, height=_HEIGHT)


@draws("ReceptiveField")
def receptive_lines(result: ReceptiveField, **look: Unpack[Look]) -> go.Figure:
    """Mean distance of what can have reached a patch, layer by layer.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.receptive_field(trace).plot()
    """
    figure = go.Figure(
        go.Scatter(
            x=list(result.layers),
            y=result.distance,
            mode="lines+markers",
            line={"color": LINE},
            customdata=result.half,
            hovertemplate="layer %{x}: %{y:.2f} patches; half from %{customdata:.1%} of them<extra></extra>",
            name="reached",
        )
    )
    figure.add_hline(
        y=result.uniform_distance,
        line={"color": BASELINE, "dash": "dot"},
        annotation_text="all patches alike",
    )
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Mean distance (patches)", rangemode="tozero")
    return style(figure, "From how far a patch can have been reached", look, height=_HEIGHT)


@draws("PatchTree")
def patch_tree(result: PatchTree, **look: Unpack[Look]) -> go.Figure:
    """The tree on the picture: an edge from each patch to its parent, roots as circles.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.tree(trace).plot()
    """
    figure = _on_picture(result.grid)
    x, y = _middles(result.grid)
    has = np.flatnonzero(result.parents >= 0)
    up = result.parents[has]
    gaps = np.full(len(has), np.nan)
    figure.add_scatter(
        x=np.stack([x[has], x[up], gaps], 1).ravel(),
        y=np.stack([y[has], y[up], gaps], 1).ravel(),
        mode="lines",
        line={"color": "rgba(255,255,255,0.75)", "width": 1.5},
        hoverinfo="skip",
        name="to the parent",
        showlegend=False,
    )
    roots = result.parents < 0
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        marker={
            "size": np.where(roots, 11, 5),
            "color": result.depth,
            "colorscale": scale(VIRIDIS),
            "line": {"color": np.where(roots, ACCENT, "rgba(0,0,0,0)"), "width": 2},
            "colorbar": {"title": {"text": "depth", "side": "right"}, "thickness": 12},
        },
        customdata=result.table()[["row", "column", "children"]],
        hovertemplate="patch (%{customdata[0]}, %{customdata[1]}): %{customdata[2]} children<extra></extra>",
        showlegend=False,
    )
    near = "" if roots.all() else f", {result.adjacent:.0%} of parents next door"
    text = f"{result.what}: tree of patches, {roots.sum()} root{'s' * int(roots.sum() != 1)}{near}"
    return style(figure, escaped(text), look, height=_HEIGHT)


@draws("PatchSegments")
def patch_segments(result: PatchSegments, **look: Unpack[Look]) -> go.Figure:
    """The segments on the picture.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.cluster(trace).plot()
    """
    figure = _on_picture(result.grid)
    left, top, right, bottom = result.grid.box
    step_x, step_y = (right - left) / result.grid.width, (bottom - top) / result.grid.height
    count = int(result.labels.max()) + 1
    colors = [_of_group(number) for number in range(max(count, 2))]
    edges = np.linspace(0, 1, len(colors) + 1)
    stops = [
        (edge, color) for number, color in enumerate(colors) for edge in edges[number : number + 2]
    ]
    figure.add_heatmap(
        z=result.labels,
        x0=left + step_x / 2,
        dx=step_x,
        y0=top + step_y / 2,
        dy=step_y,
        zmin=-0.5,
        zmax=len(colors) - 0.5,
        colorscale=stops,
        opacity=0.5,
        showscale=False,
        hovertemplate="segment %{z}<extra></extra>",
    )
    text = f"{result.what}: {count} segments of patches that look alike (τ = {result.tau:g})"
    return style(figure, escaped(text), look, height=_HEIGHT)


@draws("Flow")
def flow_grid(result: Flow, **look: Unpack[Look]) -> go.Figure:
    """How unequal the keys of every head are: the Gini of what they receive.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.flow(trace).plot()
    """
    return grid(
        result.gini,
        "How unequally keys receive (0 alike, 1 all on one)",
        look,
        unit="Gini",
        cell=26,
        layers=result.layers,
        most=1,
        data=np.stack([result.largest, result.exclusive, result.uniform["gini"]], -1),
        hover="Gini %{z:.3f} (uniform attention %{customdata[2]:.3f})<br>most on one key "
        "%{customdata[0]:.1f} times uniform attention's, least own intake %{customdata[1]:.3f}",
    )


@draws("CodingRate")
def coding_lines(result: CodingRate, **look: Unpack[Look]) -> go.Figure:
    """Coding rate of the values, a point per head and the mean of each layer.

    Example:
        >>> figure = lens.vision.coding_rate(vit, {"pixel_values": images}).plot()
    """
    table = result.table()
    figure = go.Figure(
        go.Scatter(
            x=table["layer"],
            y=table["rate"],
            mode="markers",
            marker={"color": LINE, "opacity": 0.5},
            text=table["name"],
            hovertemplate="%{text}: %{y:.2f} nats<extra></extra>",
            name="heads",
        )
    )
    figure.add_scatter(
        x=list(result.layers),
        y=result.rate.mean(-1),
        mode="lines",
        line={"color": ACCENT},
        name="mean",
    )
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Coding rate (nats)", rangemode="tozero")
    text = f"Coding rate of values: {result.lowest:.1f} on one line, {result.highest:.1f} spread evenly"
    return style(figure, text, look, height=_HEIGHT)


def _of_group(number: int) -> str:
    return qualitative.Dark24[number % len(qualitative.Dark24)]


def _along(count: int) -> list[str]:
    places = np.linspace(0, len(VIRIDIS) - 3, max(count, 2)).astype(int)
    return [VIRIDIS[place] for place in places]


def _middles(grid: PatchGrid) -> tuple[np.ndarray, np.ndarray]:
    """[patches] x and y in pixels of the picture, row by row."""
    left, top, right, bottom = grid.box
    rows, columns = np.divmod(np.arange(grid.height * grid.width), grid.width)
    return (
        left + (columns + 0.5) * (right - left) / grid.width,
        top + (rows + 0.5) * (bottom - top) / grid.height,
    )


def _on_picture(grid: PatchGrid) -> go.Figure:
    """An empty figure with the picture under it, in its own pixels."""
    height, width = grid.size
    figure = go.Figure()
    figure.add_layout_image(
        source=picture_uri(grid.pixels),
        x=0,
        y=0,
        sizex=width,
        sizey=height,
        xref="x",
        yref="y",
        sizing="stretch",
        layer="below",
    )
    figure.update_xaxes(range=[0, width], showgrid=False, showticklabels=False, constrain="domain")
    figure.update_yaxes(range=[height, 0], showgrid=False, showticklabels=False, scaleanchor="x")
    return figure


@draws("PatternSummary")
def pattern_scatter(result: PatternSummary, **look: Unpack[Look]) -> go.Figure:
    """Every map as a point, a colour per group, left by the autoencoder and right by principal components.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = lens.vision.patterns(trace, steps=20, progress=False).plot()
    """
    table = result.table()
    figure = make_subplots(cols=2, rows=1, horizontal_spacing=0.08)
    for column, end in enumerate(("", "_pca"), start=1):
        for group, rows in table.groupby(f"group{end}"):
            figure.add_scatter(
                x=rows[f"x{end}"],
                y=rows[f"y{end}"],
                mode="markers",
                marker={"color": _of_group(int(str(group))), "size": 7, "opacity": 0.75},
                text=rows["name"] + ", picture " + rows["picture"].astype(str),
                hovertemplate=f"%{{text}}: group {group}<extra></extra>",
                name=f"group {group}",
                showlegend=False,
                row=1,
                col=column,
            )
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False)
    own, other = result.found, result.baseline
    text = (
        f"{len(own.prototypes)} patterns by the autoencoder (left, {own.missed:.0%} of the variance lost), "
        f"{len(other.prototypes)} by principal components (right, {other.missed:.0%} lost)"
    )
    return style(figure, text, look, height=_HEIGHT)


def prototypes(result: PatternSummary, **look: Unpack[Look]) -> go.Figure:
    """The prototype of each group: who looks (down) at whom (across), as a multiple of uniform attention.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> found = lens.vision.patterns(trace, steps=20, progress=False)
        >>> figure = lens.figures.vision.prototypes(found)
    """
    shown = result.found.prototypes
    share = result.found.table()["share"]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    titles = [
        f"<span style='color:{_of_group(group)}'>●</span> {group}: {share[group]:.0%}"
        for group in range(len(shown))
    ]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.12)
    for group, one in enumerate(shown):
        figure.add_heatmap(
            z=np.square(one)[::-1],
            colorscale=scale(VIRIDIS),
            zmin=0,
            zmax=float(np.square(one).max()),
            showscale=False,
            hovertemplate=f"group {group}: %{{z:.2f}} times uniform<extra></extra>",
            row=group // columns + 1,
            col=group % columns + 1,
        )
    figure.update_xaxes(showticklabels=False, constrain="domain")
    figure.update_yaxes(showticklabels=False)
    text = "Prototypes: rows look at columns, patches from the top left on; above each its colour and share of the maps"
    return style(figure, text, look, height=90 + 190 * rows)


def ring_trend(
    mass: np.ndarray, uniform: np.ndarray, layers: Sequence[int], **look: Unpack[Look]
) -> go.Figure:
    """Mass of the rings over the layers: [layers, heads, rings], mean over heads, with uniform attention [layers, rings] dotted.

    Rings from the fifth on are one.
    """
    figure = go.Figure()
    groups = [(ring, ring + 1) for ring in range(min(4, mass.shape[-1]))] + [(4, mass.shape[-1])]
    colors = _along(len(groups))
    for number, (first, past) in enumerate(groups):
        if first >= past:
            continue
        name = f"ring {first}" if past == first + 1 else f"rings {first} to {past - 1}"
        figure.add_scatter(
            x=list(layers),
            y=mass[..., first:past].sum(-1).mean(1),
            mode="lines+markers",
            name=name,
            line={"color": colors[number]},
            hovertemplate="layer %{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
        figure.add_scatter(
            x=list(layers),
            y=uniform[:, first:past].sum(-1),
            mode="lines",
            line={"color": colors[number], "dash": "dot", "width": 1},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Attention (mean over heads)", rangemode="tozero")
    return style(figure, "Attention by ring over the layers; dotted: uniform", look, height=_HEIGHT)
