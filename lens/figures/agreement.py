"""Measures of importance against each other: rank agreement of all pairs, and two as axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import DIVERGING, LINE, scale
from lens.common.given import given_as, given_table
from lens.figures.rows import whiskers
from lens.figures.style import Look, escaped, style
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    import pandas as pd

    from lens.heads.measures.agreements import Agreement


def agreement_map(agreement: Agreement, **look: Unpack[Look]) -> go.Figure:
    """Kendall's tau of every pair of measures; hovering gives intervals and the top-k overlap.

    Example:
        >>> measures = [lens.heads.importance(small, copying, method=one) for one in ("gradient", "gate")]
        >>> lens.figures.agreement_map(lens.heads.agreement(*measures))
    """
    rows = given_as("Agreement", agreement=agreement).table()
    labels = list(dict.fromkeys([*rows["first"], *rows["second"]]))
    place = {label: index for index, label in enumerate(labels)}
    taus = np.eye(len(labels))
    text = np.full(taus.shape, "", dtype=object)
    for row in rows.to_dict("records"):
        a, b = place[row["first"]], place[row["second"]]
        taus[a, b] = taus[b, a] = row["tau"]
        text[a, b] = text[b, a] = (
            f"<br>95 % interval {row['tau_low']:.2f} to {row['tau_high']:.2f}<br>top "
            f"{agreement.k} shared {row['overlap']:.0%} (by chance {row['overlap_by_chance']:.0%})"
        )
    names = [escaped(label) for label in labels]
    figure = go.Figure(
        go.Heatmap(
            z=taus,
            x=names,
            y=names,
            zmin=-1,
            zmid=0,
            zmax=1,
            colorscale=scale(DIVERGING),
            colorbar={"title": {"text": "Kendall's tau", "side": "right"}, "thickness": 12},
            xgap=1,
            ygap=1,
            text=text,
            hovertemplate="%{y} and %{x}: %{z:.2f}%{text}<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return style(figure, _finding(rows), look, meta={"figure": "agreement_map", "k": agreement.k})


def _finding(rows: pd.DataFrame) -> str:
    known = rows.dropna(subset=["tau"])
    if known.empty:
        return "Rank agreement: no pair of measures has an order to compare"
    worst = known.sort_values("tau").iloc[0]
    told = of_many_told(worst, "tau", ".2f", len(known), 0, least=-1, most=1)
    return escaped(
        f"Rank agreement: least between {worst['first']} and {worst['second']}, tau {told}"
    )


def measure_scatter(joined: pd.DataFrame, x: str, y: str, **look: Unpack[Look]) -> go.Figure:
    """Every head as a point, any two measures of `lens.heads.join` as axes, with their intervals.

    Args:
        joined: one row per head with the column `name`, and for each measure its value; its interval
            where the columns with `_low` and `_high` are there.
        x, y: names of measures.

    Raises:
        LensError: a measure that the table has not.

    Example:
        >>> measures = [lens.heads.importance(small, copying, method=one) for one in ("gradient", "gate")]
        >>> lens.figures.measure_scatter(lens.heads.join(*measures), "gradient", "gate")
    """
    given_table(joined, x, y)
    figure = go.Figure(
        go.Scatter(
            x=joined[x],
            y=joined[y],
            mode="markers",
            text=joined["name"],
            marker={"size": 8, "color": LINE, "line": {"width": 1, "color": "white"}},
            error_x=_bars(joined, x),
            error_y=_bars(joined, y),
            hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title=escaped(x))
    figure.update_yaxes(title=escaped(y))
    return style(
        figure,
        escaped(f"{y} against {x}, one point a head"),
        look,
        meta={"figure": "measure_scatter", "x": x, "y": y},
    )


def _bars(joined: pd.DataFrame, name: str) -> dict[str, object] | None:
    if f"{name}_low" not in joined or f"{name}_high" not in joined:
        return None
    return whiskers(joined[name], joined[f"{name}_low"], joined[f"{name}_high"])
