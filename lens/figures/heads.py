"""Figures over all heads: the layer × head grid, the scatter of two metrics, the trend over layers.

All take the long table of `heads.parquet` (docs/schema/run-folder.md), cut to one `prompt_id`.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.errors import LensError
from lens.figures.colors import ACCENT, DIVERGING, LINE, VIRIDIS, scale
from lens.figures.style import Theme, style
from lens.metrics import METRICS


def select(table: pd.DataFrame, metric: str, variant: str = "raw") -> pd.DataFrame:
    """Rows of one metric and variant.

    Raises:
        LensError: the metric is not in the table, or more than one `prompt_id` is left.
    """
    rows = table[(table["metric"] == metric) & (table["variant"] == variant)]
    if rows.empty:
        have = ", ".join(dict.fromkeys(table["metric"]))
        raise LensError(f"no rows of {metric!r} ({variant}) in the table; it has: {have}")
    if rows["prompt_id"].nunique() > 1:
        raise LensError(
            "the table holds several prompts; choose one: table[table.prompt_id == 'text']"
        )
    return rows


def label(metric: str, variant: str) -> str:
    """Name of a metric for an axis, with its unit."""
    known = METRICS[metric]
    without = ", sink excluded" if variant == "sink_excluded" else ""
    return f"{known.label}{without} ({known.unit})"


def head_grid(
    table: pd.DataFrame,
    metric: str,
    variant: str = "raw",
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """One metric of every head: layers down, heads across.

    Signed values get a scale centred at 0. Heads that were not scored stay blank.
    """
    rows = select(table, metric, variant)
    grid = rows.pivot(index="layer", columns="head", values="value")
    low = rows.pivot(index="layer", columns="head", values="low").to_numpy()
    high = rows.pivot(index="layer", columns="head", values="high").to_numpy()
    values = grid.to_numpy(dtype=float)
    signed = bool(np.nanmin(values) < 0) if np.isfinite(values).any() else False
    bound = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    limits: dict[str, Any] = (
        {"zmid": 0, "zmin": -bound, "zmax": bound} if signed else {"zmin": 0, "zmax": bound}
    )
    interval = [
        [
            "" if np.isnan(a) else f"<br>95 % interval {a:.3g} to {b:.3g}"
            for a, b in zip(*pair, strict=True)
        ]
        for pair in zip(low, high, strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=grid.columns.to_numpy(),
            y=grid.index.to_numpy(),
            colorscale=scale(DIVERGING if signed else VIRIDIS),
            colorbar={"title": {"text": METRICS[metric].unit, "side": "right"}, "thickness": 12},
            xgap=1,
            ygap=1,
            text=interval,
            hovertemplate="L%{y}H%{x}: %{z:.4g}%{text}<extra></extra>",
            hoverongaps=False,
            **limits,
        )
    )
    figure.update_xaxes(title="head", dtick=1 if len(grid.columns) <= 32 else None, showgrid=False)
    figure.update_yaxes(
        title="layer",
        autorange="reversed",
        dtick=1 if len(grid.index) <= 32 else None,
        showgrid=False,
    )
    return style(
        figure,
        title=title or _finding(rows, metric, variant),
        width=width,
        height=height,
        theme=theme,
        meta={"metric": metric, "variant": variant},
    )


def _finding(rows: pd.DataFrame, metric: str, variant: str) -> str:
    name = label(metric, variant)
    if rows["value"].isna().all():
        return f"{name}: not scored ({rows['detail'].iloc[0]})"
    best = rows.loc[rows["value"].idxmax()]
    return f"{name}: highest at L{best['layer']}H{best['head']}, {best['value']:.3g}"


def head_scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    color: str | None = None,
    variant: str = "raw",
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Every head as a point: two metrics as axes, a third as colour (the layer if None).

    `variant` holds for the metrics that have it.
    """
    names = dict.fromkeys(name for name in (x, y, color) if name is not None)
    used = {name: variant if METRICS[name].sink_excluded else "raw" for name in names}
    columns = {
        name: select(table, name, used[name]).set_index(["layer", "head"])["value"]
        for name in names
    }
    heads = pd.DataFrame(columns).reset_index()
    shade = heads["layer"] if color is None else heads[color]
    figure = go.Figure(
        go.Scatter(
            x=heads[x],
            y=heads[y],
            mode="markers",
            text=_names(heads),
            marker={
                "size": 9,
                "color": shade,
                "colorscale": scale(VIRIDIS),
                "line": {"width": 1, "color": "white"},
                "colorbar": {
                    "title": {
                        "text": "layer" if color is None else label(color, used[color]),
                        "side": "right",
                    },
                    "thickness": 12,
                },
            },
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title=label(x, used[x]))
    figure.update_yaxes(title=label(y, used[y]))
    return style(
        figure,
        title=title or f"{METRICS[y].label} against {METRICS[x].label.lower()}, one point a head",
        width=width,
        height=height,
        theme=theme,
        meta={"x": x, "y": y, "color": color, "variant": variant},
    )


def _names(heads: pd.DataFrame) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in zip(heads["layer"], heads["head"], strict=True)]


def metric_by_layer(
    table: pd.DataFrame,
    metric: str,
    variant: str = "raw",
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """One metric over the layers: every head a point, the mean a line."""
    rows = select(table, metric, variant)
    means = rows.groupby("layer")["value"].mean()
    figure = go.Figure(
        [
            go.Scatter(
                x=rows["layer"],
                y=rows["value"],
                mode="markers",
                name="head",
                text=_names(rows),
                marker={"color": LINE, "size": 6, "opacity": 0.55},
                hovertemplate="%{text}: %{y:.4g}<extra></extra>",
            ),
            go.Scatter(
                x=means.index,
                y=means,
                mode="lines",
                name="mean of the layer",
                line={"color": ACCENT, "width": 2},
                hovertemplate="layer %{x}: %{y:.4g}<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title="layer", dtick=1 if len(means) <= 12 else None)
    figure.update_yaxes(title=label(metric, variant))
    return style(
        figure,
        title=title or f"{METRICS[metric].label} over the layers",
        width=width,
        height=height,
        theme=theme,
        meta={"metric": metric, "variant": variant},
    )
