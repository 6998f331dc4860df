"""A number of every head: layers down, heads across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import DIVERGING, VIRIDIS, scale
from lens.figures.style import Look, grid_axes, grid_height, style


def heat(
    values: np.ndarray,
    unit: str,
    *,
    layers: Sequence[Any] | None = None,
    heads: Sequence[Any] | None = None,
    signed: bool | None = None,
    most: float | None = None,
    text: Sequence[Sequence[str]] | None = None,
    data: Any = None,
    hover: str = "%{z:.4g}%{text}",
) -> dict[str, Any]:
    """The trace of `grid`.

    Args:
        values: [layers, heads]; heads that are NaN stay blank.
        unit: beside the scale.
        layers: their numbers; None: from 0 on. With gaps (hybrids) rows stand one by one under their numbers.
        heads: as `layers`.
        signed: red above 0 and blue below it; None: where any is below 0.
        most: where the scale ends; None: at the largest size.
        text: [layers, heads], behind each number on hover.
        data: [layers, heads] or [layers, heads, n], for `hover` and clicks.
        hover: behind the name of the head.
    """
    values = np.asarray(values, float)
    known = values[np.isfinite(values)]
    if signed is None:
        signed = bool((known < 0).any())
    if most is None:
        most = float(np.abs(known).max(initial=0)) or 1.0
    down, across = (
        list(range(count)) if given is None else [int(one) for one in given]
        for count, given in zip(values.shape, (layers, heads), strict=True)
    )
    return {
        "type": "heatmap",
        "z": values,
        "x": across,
        "y": down if down == list(range(down[0], down[0] + len(down))) else [*map(str, down)],
        "colorscale": scale(DIVERGING if signed else VIRIDIS),
        "zmin": -most if signed else 0,
        "zmax": most,
        **({"zmid": 0} if signed else {}),
        "colorbar": {"title": {"text": unit, "side": "right"}, "thickness": 12},
        "xgap": 1,
        "ygap": 1,
        "text": [[""] * len(across)] * len(down) if text is None else text,
        "customdata": data,
        "hovertemplate": f"L%{{y}}H%{{x}}: {hover}<extra></extra>",
        "hoverongaps": False,
    }


def grid(
    values: np.ndarray,
    found: str,
    look: Look,
    *,
    unit: str,
    meta: Mapping[str, Any] | None = None,
    cell: int = 18,
    **more: Any,
) -> go.Figure:
    """A number of every head [layers, heads]: layers down, heads across.

    Args:
        values: as of `heat`, which takes `unit` and what is in `more` too.
        found: the title where `look` has none.
        look: title, size and theme.
        meta: what the figure was made from.
        cell: pixels of a row.
    """
    figure = go.Figure(heat(values, unit, **more))
    grid_axes(figure, *values.shape)
    return style(figure, found, look, height=grid_height(len(values), cell), meta=meta)
