"""Figures at the size of a paper's column: the same data, small print, no waste."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap
from typing import Any, Literal

import plotly.graph_objects as go

from lens.common.choices import is_number
from lens.common.errors import LensError

WIDTHS: dict[str, float] = {"single": 3.25, "double": 6.75}
"""Inches of one column and of two."""
PIXELS_PER_INCH = 96
_POINTS_PER_INCH = 72
_LEAST = 1.2  # inches of height
_MARGIN = {"l": 44, "r": 10, "b": 36}
_SHIFT = 0.65  # plotly puts a title of several lines higher
_LINE = 1.95  # characters a line, times width over size of print


def for_paper(
    figure: go.Figure,
    *,
    width: Literal["single", "double"] = "single",
    ratio: float | None = None,
    points: float = 8,
    title: bool = True,
) -> go.Figure:
    """A copy of a figure with all print at `points` and the width of one or two columns.

    96 pixels are an inch, so SVG and PDF come out at 3.25 or 6.75 in; for 300 dpi, write PNG with
    `scale=300 / 96`.

    Args:
        figure: any of `lens.figures`, light theme.
        width: `single` (3.25 in) or `double` (6.75 in).
        ratio: height / width; None: 0.75 for one column and 0.5 for two.
        points: size of all print.
        title: keep the title; papers often say it in the caption.

    Raises:
        LensError: another width, or a ratio or size that is not positive.

    Example:
        >>> figure = lens.figures.for_paper(lens.figures.row_entropy(trace, 1, 0), title=False)
        >>> figure.layout.width / 96
        3.25
    """
    if width not in WIDTHS:
        raise LensError(f"width must be {' or '.join(WIDTHS)}, got {width!r}")
    ratio = (0.75 if width == "single" else 0.5) if ratio is None else ratio
    if not all(is_number(one) and one > 0 for one in (ratio, points)):
        raise LensError(f"ratio and points must be positive, got {ratio} and {points}")
    across = WIDTHS[width] * PIXELS_PER_INCH
    size = points * PIXELS_PER_INCH / _POINTS_PER_INCH
    if not isinstance(figure, go.Figure):
        raise LensError(
            f"for_paper takes a figure, such as result.plot(), got {type(figure).__name__}"
        )
    made: Any = go.Figure(figure)
    lines = _wrapped(made.layout.title.text, round(_LINE * across / size)) if title else []
    font = {"size": size}
    made.update_layout(
        width=round(across),
        height=round(max(across * ratio, _LEAST * PIXELS_PER_INCH)),
        font=font,
        margin={**_MARGIN, "t": 12 + round(1.35 * size * len(lines))},
        legend={"font": font, "orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
        title={
            "text": "<br>".join(lines),
            "font": font,
            "x": 0,
            "xref": "container",
            "pad": {"l": 6, "t": 6 + round(_SHIFT * size * (len(lines) > 1))},
        },
    )
    made.update_xaxes(title={"font": font, "standoff": 4}, tickfont=font)
    made.update_yaxes(title={"font": font, "standoff": 4}, tickfont=font)
    made.update_annotations(font=font)
    bar = {"tickfont": font, "title": {"font": font}, "thickness": 8}
    made.update_traces(colorbar=bar, selector={"type": "heatmap"})
    scatters: Iterable[Any] = made.select_traces(selector={"type": "scatter"})
    for trace in scatters:
        trace.update(textfont=font, marker={"size": _small(trace.marker.size)})
        if trace.marker.showscale or trace.marker.colorbar.title.text is not None:
            trace.marker.update(colorbar=bar)
    return made


def _wrapped(title: str | None, width: int) -> list[str]:
    """Lines of a title; entities such as `&lt;` and tags are never cut."""
    return [line for part in (title or "").split("<br>") for line in wrap(part, width)]


def _small(size: object) -> object:
    """Markers for a column: at most 5 pixels, or plotly's own where a figure gives none."""
    return min(size, 5) if isinstance(size, (int, float)) else size
