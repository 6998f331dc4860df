"""Attention over the picture that it is on, cell by cell where the patches lie; and how well it finds boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens.common.colors import ACCENT, BASELINE, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.pictures import picture_uri
from lens.figures.rows import bars
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lens.traces.overlays import Overlay
    from lens.vision.grounding import Grounding

_ACROSS = 3  # pictures side by side
_CELL = 190  # pixels of a picture's height on the page
SCAN_STOPS = 8  # of a scan path
_BOX = "#ffffff"


@draws("Overlay")
def overlay_map(
    result: Overlay,
    *,
    alpha: float = 0.6,
    path: bool = False,
    boxes: Sequence[Sequence[float]] = (),
    **look: Unpack[Look],
) -> go.Figure:
    """The picture with the attention of each map over it; a cross marks the patch in question.

    Args:
        alpha: of the map over the picture.
        boxes: (left, top, right, bottom) in pixels of the picture, drawn on it.
        path: also what is looked at most, numbered from the strongest on, joined as a scan path.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> figure = trace.overlay(["L0H0", "L1H1"], query="[CLS]").plot(path=True)
    """
    grid, count = result.grid, len(result.names)
    across = min(_ACROSS, count)
    down = -(-count // across)
    titles = [escaped(name) for name in result.names] if count > 1 else None
    figure = make_subplots(
        down, across, subplot_titles=titles, horizontal_spacing=0.02, vertical_spacing=0.16 / down
    )
    height, width = grid.size
    left, top, right, bottom = grid.box
    step_x, step_y = (right - left) / grid.width, (bottom - top) / grid.height
    address = picture_uri(grid.pixels)
    for number, values in enumerate(result.values):
        at = {"row": number // across + 1, "col": number % across + 1}
        figure.add_layout_image(
            source=address,
            x=0,
            y=0,
            sizex=width,
            sizey=height,
            xref="x",
            yref="y",
            sizing="stretch",
            layer="below",
            **at,
        )
        figure.add_heatmap(
            z=values,
            x0=left + step_x / 2,
            dx=step_x,
            y0=top + step_y / 2,
            dy=step_y,
            zmin=0,
            colorscale=scale(VIRIDIS),
            opacity=alpha,
            showscale=count == 1,
            colorbar={"title": {"text": "mass", "side": "right"}, "thickness": 12},
            text=[
                [f"patch ({row}, {column})" for column in range(grid.width)]
                for row in range(grid.height)
            ],
            hovertemplate="%{text}<br>%{z:.4g}<extra></extra>",
            **at,
        )
        for box in boxes:
            ends = dict(zip(("x0", "y0", "x1", "y1"), map(float, box), strict=True))
            figure.add_shape(type="rect", line={"color": _BOX, "width": 3}, **ends, **at)
        if result.query is not None:
            ends = grid.cell(*result.query)
            figure.add_scatter(
                x=[(ends[0] + ends[2]) / 2],
                y=[(ends[1] + ends[3]) / 2],
                mode="markers",
                marker={"symbol": "x-thin", "size": 12, "line": {"color": ACCENT, "width": 3}},
                hoverinfo="skip",
                showlegend=False,
                **at,
            )
        if path:
            seen = result.regions(number).head(SCAN_STOPS)
            figure.add_scatter(
                x=seen["x"],
                y=seen["y"],
                mode="lines+markers+text",
                text=[str(one + 1) for one in seen["region"]],
                textposition="top center",
                textfont={"color": ACCENT},
                line={"color": ACCENT},
                showlegend=False,
                customdata=seen["mass"],
                hovertemplate="%{customdata:.1%} of what lies on patches<extra></extra>",
                **at,
            )
    figure.update_xaxes(range=[0, width], showgrid=False, showticklabels=False, constrain="domain")
    figure.update_yaxes(range=[height, 0], showgrid=False, showticklabels=False)
    for number in range(count):
        figure.layout[
            f"yaxis{number + 1 if number else ''}"
        ].scaleanchor = f"x{number + 1 if number else ''}"
    name = f"{result.names[0]}: " if count == 1 else ""
    text = escaped(f"{name}{result.what}; {result.elsewhere.mean():.1%} on no patch shown")
    return style(figure, text, look, height=min(900, 70 + (_CELL if count > 1 else 420) * down))


@draws("Grounding")
def box_scores(result: Grounding, *, most: int = 20, **look: Unpack[Look]) -> go.Figure:
    """IoU of the maps that cover the boxes best, beside patches round the middle and the whole picture.

    Args:
        most: maps to draw, the best first.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> found = lens.vision.grounding(trace.overlay(["L0H0", "L1H1"], query="[CLS]"), [(4, 4, 12, 12)])
        >>> figure = found.plot()
    """
    table = result.table().sort_values("iou", ascending=False, kind="stable").head(most)
    figure = go.Figure()
    figure.add_scatter(
        x=table["map"],
        y=table["iou"],
        mode="markers",
        marker={"color": ACCENT, "size": 9},
        error_y=bars(table, "iou"),
        customdata=table["pointing"],
        hovertemplate="%{x}: IoU %{y:.3f}, points into a box in %{customdata:.0%}<extra></extra>",
        showlegend=False,
    )
    for name, dash, said in (
        ("iou_middle", "dash", "patches round the middle"),
        ("iou_whole", "dot", "the whole picture"),
    ):
        figure.add_scatter(
            x=table["map"],
            y=table[name],
            mode="lines",
            name=said,
            line={"color": BASELINE, "dash": dash},
        )
    figure.update_yaxes(title="IoU at the best threshold", range=[0, 1])
    count = int(table["n"].iloc[0])
    text = f"How well maps cover the boxes of {count} picture{'s' * (count > 1)}"
    return style(figure, text, look, height=420)
