"""Any columns of a table with one row per head: two as axes and one as colour, or one as a grid.

The table has `layer` and `head` beside the columns; `labels` says what an axis
is called, the name of the column otherwise.
"""

from collections.abc import Collection, Mapping
from typing import Any, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, CLASSES, VIRIDIS, scale
from lens.common.errors import LensError
from lens.figures.grids import grid
from lens.figures.rows import head_names
from lens.figures.style import Look, escaped, style
from lens.stats.verdicts import of_many_told


def column_scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    color: str | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    marked: Collection[str] = (),
    **look: Unpack[Look],
) -> go.Figure:
    """Every head as a point; heads without both values are left out, and the title says how many.

    Args:
        table: one row per head.
        x, y: columns of numbers.
        color: column of numbers or of classes; the layer if None.
        labels: column -> words for its axis.
        marked: heads ("L3H5") that get a ring and their name.

    Raises:
        LensError: a column that is not there, or axes without numbers.
    """
    words = dict(labels or {})
    shade_name = color or "layer"
    _check(table, (x, y), shade_name)
    rows = table[table[[x, y]].notna().all(axis=1).to_numpy()]
    if rows.empty:
        raise LensError(f"no head has both {x!r} and {y!r}")
    names = head_names(rows["layer"], rows["head"])
    figure = go.Figure()
    shade = rows[shade_name]
    common: dict[str, Any] = {"mode": "markers", "hovertemplate": _HOVER}
    if pd.api.types.is_numeric_dtype(shade):
        figure.add_scatter(
            x=rows[x],
            y=rows[y],
            text=names,
            marker={
                "size": 9,
                "color": shade,
                "colorscale": scale(VIRIDIS),
                "line": {"width": 1, "color": "white"},
                "colorbar": {
                    "title": {"text": escaped(words.get(shade_name, shade_name)), "side": "right"},
                    "thickness": 12,
                },
            },
            showlegend=False,
            **common,
        )
    else:
        for number, (name, part) in enumerate(rows.groupby(shade.fillna("none"), sort=True)):
            figure.add_scatter(
                x=part[x],
                y=part[y],
                text=head_names(part["layer"], part["head"]),
                name=escaped(str(name).replace("_", " ")),
                marker={"size": 9, "color": CLASSES[number % len(CLASSES)]},
                **common,
            )
    ringed = [name in marked for name in names]
    if any(ringed):
        chosen = rows[ringed]
        figure.add_scatter(
            x=chosen[x],
            y=chosen[y],
            text=head_names(chosen["layer"], chosen["head"]),
            mode="markers+text",
            textposition="top center",
            name="selected",
            marker={
                "size": 15,
                "color": "rgba(0,0,0,0)",
                "line": {"width": 2, "color": ACCENT},
            },
            hovertemplate=_HOVER,
        )
    figure.update_xaxes(title=escaped(words.get(x, x)))
    figure.update_yaxes(title=escaped(words.get(y, y)))
    left = len(table) - len(rows)
    return style(
        figure,
        f"{len(rows)} heads, one point each"
        + (f"; {left} without both values are left out" if left else ""),
        look,
        meta={"figure": "column_scatter", "x": x, "y": y, "color": shade_name},
    )


def column_grid(
    table: pd.DataFrame,
    column: str,
    *,
    labels: Mapping[str, str] | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """One column of numbers, layers down and heads across; heads without a value are blank.

    Raises:
        LensError: a column that is not there or has no numbers.
    """
    _check(table, (column,), column)
    wide = table.pivot(index="layer", columns="head", values=column)
    values = wide.to_numpy(dtype=float)
    if not np.isfinite(values).any():
        raise LensError(f"no head has {column!r}")
    words = escaped((labels or {}).get(column, column))
    row = table.iloc[int(np.nanargmax(table[column].to_numpy(float)))]
    best, told = f"L{int(row['layer'])}H{int(row['head'])}", f"{row[column]:.3g}"
    if {f"{column}_low", f"{column}_high"} <= set(table):
        units = row.get("n", row.get("prompts", 0))
        told = of_many_told(row, column, ".3g", int(np.isfinite(values).sum()), int(units))
    return grid(
        values,
        f"{words}: highest at {best}, {told}",
        look,
        unit=words,
        layers=wide.index,
        heads=wide.columns,
        meta={"figure": "column_grid", "column": column},
    )


def _check(table: pd.DataFrame, axes: tuple[str, ...], shade: str) -> None:
    have = [str(name) for name in table.columns]
    for name in ("layer", "head", *axes, shade):
        if name not in have:
            raise LensError(f"the table of heads has no column {name!r}; it has: {', '.join(have)}")
    for name in axes:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise LensError(f"column {name!r} holds no numbers, so it cannot be an axis")


_HOVER = "%{text}: %{x:.4g}, %{y:.4g}<extra></extra>"
