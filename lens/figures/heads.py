"""Figures over all heads: the layer × head grid, the scatter of two metrics, the trend over layers.

All take the long table of `heads.parquet` (docs/schema/run-folder.md), cut to one `prompt_id`.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, LINE, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.given import given_table
from lens.figures.grids import grid, heat
from lens.figures.rows import head_names
from lens.figures.style import Look, escaped, style
from lens.stats.verdicts import of_many_told
from lens.traces.metrics import metric_of

_COLUMNS = ("prompt_id", "layer", "head", "metric", "variant", "value", "low", "high", "detail")


def select(table: pd.DataFrame, metric: str, variant: str = "raw") -> pd.DataFrame:
    """Rows of one metric and variant.

    Raises:
        LensError: the metric is not in the table, more than one `prompt_id` is left, or the wide
            table of `lens.profile`.
    """
    given_table(table)
    if missing := [name for name in _COLUMNS if name not in table]:
        raise LensError(
            f"figures of heads take the long table, one row per head and metric; this one lacks "
            f"{', '.join(missing)}: use lens.traces.profiles.prompt_table(trace, name) instead of lens.profile"
        )
    chosen = (table["metric"] == metric) & (table["variant"] == variant)
    rows = table.loc[chosen.to_numpy()]
    if rows.empty:
        have = ", ".join(dict.fromkeys(table["metric"]))
        raise LensError(f"no rows of {metric!r} ({variant}) in the table; it has: {have}")
    if len(set(rows["prompt_id"])) > 1:
        raise LensError(
            "the table holds several prompts; choose one: table[table.prompt_id == 'text']"
        )
    return rows


def label(metric: str, variant: str) -> str:
    """Name of a metric for an axis, with its unit."""
    known = metric_of(metric)
    without = ", sink excluded" if variant == "sink_excluded" else ""
    return escaped(f"{known.label}{without} ({known.unit})")


def head_grid(
    table: pd.DataFrame, metric: str, variant: str = "raw", **look: Unpack[Look]
) -> go.Figure:
    """One metric of every head: layers down, heads across.

    Signed values get a scale centred at 0. Heads that were not scored stay blank.

    Example:
        >>> from lens.traces.profiles import prompt_table
        >>> lens.figures.head_grid(prompt_table(trace, "text"), "sink_rate").layout.title.text
        'Sink rate (probability): highest at L1H0, 1'
    """
    rows = select(table, metric, variant)
    return grid(
        found=_finding(rows, metric, variant),
        look=look,
        cell=26,
        meta=_meta(rows, "head_grid", metric=metric, variant=variant),
        **_cells(rows, metric),
    )


def plain_grids(
    table: pd.DataFrame, pairs: Iterable[tuple[str, str]], **look: Unpack[Look]
) -> dict[tuple[str, str], dict[str, Any]]:
    """`head_grid` of many metrics and variants as plotly's JSON; their layout, which takes longest, is made once.

    Args:
        table: as of `head_grid`.
        pairs: metric and variant of each.
        look: of all; no title.
    """
    # of Arrow's strings each choice of rows would take twice as long
    plain = table.astype(dict.fromkeys(table.select_dtypes(exclude="number"), object))
    parts = {pair: select(plain, *pair) for pair in pairs}
    cells = {pair: _cells(rows, pair[0]) for pair, rows in parts.items()}
    drawn = go.Figure([heat(**one) for one in cells.values()]).to_plotly_json()["data"]
    layouts: dict[tuple[int, int], dict[str, Any]] = {}
    made = {}
    for (pair, rows), trace in zip(parts.items(), drawn, strict=True):
        shape = cells[pair]["values"].shape
        if shape not in layouts:
            layouts[shape] = head_grid(rows, *pair, **look).to_plotly_json()["layout"]
        layout = layouts[shape]
        title = layout["title"] | {"text": _finding(rows, *pair)}
        meta = _meta(rows, "head_grid", metric=pair[0], variant=pair[1])
        made[pair] = {"data": [trace], "layout": layout | {"title": title, "meta": meta}}
    return made


def _cells(rows: pd.DataFrame, metric: str) -> dict[str, Any]:
    """What `grid` and `heat` take of these rows."""
    layers, down = np.unique(rows["layer"], return_inverse=True)
    heads, across = np.unique(rows["head"], return_inverse=True)
    values, low, high = np.full((3, len(layers), len(heads)), np.nan)
    for part, name in ((values, "value"), (low, "low"), (high, "high")):
        part[down, across] = rows[name]
    interval = [
        [
            "" if np.isnan(a) else f"<br>95 % interval {a:.3g} to {b:.3g}"
            for a, b in zip(*pair, strict=True)
        ]
        for pair in zip(low, high, strict=True)
    ]
    unit = metric_of(metric).unit
    most = 1.0 if unit == "probability" else None  # 0.02 must not look like a find
    return {
        "values": values,
        "unit": unit,
        "layers": layers,
        "heads": heads,
        "most": most,
        "text": interval,
    }


def _finding(rows: pd.DataFrame, metric: str, variant: str) -> str:
    name, values = label(metric, variant), rows["value"].to_numpy(float)
    if np.isnan(values).all():
        return f"{name}: not scored ({rows['detail'].iloc[0]})"
    best = rows.iloc[int(np.nanargmax(values))]
    least = 0 if (values[~np.isnan(values)] >= 0).all() else -np.inf
    most = 1 if metric_of(metric).unit == "probability" else np.inf
    units = 0 if np.isnan(best["n"]) else int(best["n"])
    many = int((~np.isnan(values)).sum())
    told = of_many_told(best, "value", ".3g", many, units, plain=True, least=least, most=most)
    return f"{name}: highest at L{int(best['layer'])}H{int(best['head'])}, {told}"


def _meta(rows: pd.DataFrame, figure: str, **chosen: Any) -> dict[str, Any]:
    """Provenance: which figure, of which scores, on which prompts."""
    return {"figure": figure, "prompt_id": str(rows["prompt_id"].iloc[0]), **chosen}


def head_scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    color: str | None = None,
    variant: str = "raw",
    **look: Unpack[Look],
) -> go.Figure:
    """Every head as a point: two metrics as axes, a third as colour (the layer if None).

    `variant` holds for the metrics that have it.

    Example:
        >>> from lens.traces.profiles import prompt_table
        >>> figure = lens.figures.head_scatter(prompt_table(trace, "text"), "entropy", "distance")
        >>> len(figure.data[0].x)  # 3 layers of 6 heads
        18
    """
    given_table(table)
    names = [x, y, *([] if color is None else [color])]
    used = {name: variant if metric_of(name).sink_excluded else "raw" for name in names}
    parts = {name: select(table, name, used[name]) for name in names}
    columns = {
        name: rows.set_index(["layer", "head"])["value"].astype(float)
        for name, rows in parts.items()
    }
    heads = pd.DataFrame(columns).reset_index()
    shade = heads["layer"] if color is None else heads[color]
    figure = go.Figure(
        go.Scatter(
            x=heads[x],
            y=heads[y],
            mode="markers",
            text=head_names(heads["layer"], heads["head"]),
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
                    "dtick": 1 if color is None and len(set(heads["layer"])) <= 12 else None,
                },
            },
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title=label(x, used[x]))
    figure.update_yaxes(title=label(y, used[y]))
    return style(
        figure,
        escaped(f"{metric_of(y).label} against {metric_of(x).label.lower()}, one point a head"),
        look,
        meta=_meta(parts[x], "head_scatter", x=x, y=y, color=color, variant=variant),
    )


def metric_by_layer(
    table: pd.DataFrame, metric: str, variant: str = "raw", **look: Unpack[Look]
) -> go.Figure:
    """One metric over the layers: every head a point, the mean a line.

    Example:
        >>> from lens.traces.profiles import prompt_table
        >>> figure = lens.figures.metric_by_layer(prompt_table(trace, "text"), "entropy")
        >>> [line.name for line in figure.data]
        ['head', 'mean of the layer']
    """
    rows = select(table, metric, variant)
    layers = sorted(set(rows["layer"]))
    means = [
        float(rows.loc[(rows["layer"] == layer).to_numpy(), "value"].mean()) for layer in layers
    ]
    figure = go.Figure(
        [
            go.Scatter(
                x=rows["layer"],
                y=rows["value"],
                mode="markers",
                name="head",
                text=head_names(rows["layer"], rows["head"]),
                marker={"color": LINE, "size": 6, "opacity": 0.55},
                hovertemplate="%{text}: %{y:.4g}<extra></extra>",
            ),
            go.Scatter(
                x=layers,
                y=means,
                mode="lines",
                name="mean of the layer",
                line={"color": ACCENT, "width": 2},
                hovertemplate="layer %{x}: %{y:.4g}<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title="layer", dtick=1 if len(layers) <= 12 else None)
    figure.update_yaxes(title=label(metric, variant))
    return style(
        figure,
        escaped(f"{metric_of(metric).label} over the layers"),
        look,
        meta=_meta(rows, "metric_by_layer", metric=metric, variant=variant),
    )
