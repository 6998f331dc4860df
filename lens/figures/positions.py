"""Figures of edges at places: the largest within and across spans, and faithfulness at equal size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.choices import check_counts
from lens.common.plots import draws
from lens.figures.rows import bars, classes, whiskers
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.circuits.checks._positions import PositionEvaluation
    from lens.circuits.scores.position_scores import PositionScores


@draws("PositionScores")
def position_bars(result: PositionScores, top: int = 20, **look: Unpack[Look]) -> go.Figure:
    """The largest scores, of edges in a place and of heads from place to place.

    Args:
        top: so many.

    Raises:
        LensError: a number that is none.

    Example:
        >>> found = lens.circuits.scores.positions(small, copying, {"first": (1, 26)}, method="eap")
        >>> figure = found.plot(top=8)
    """
    check_counts(top=top)
    rows = result.table(top)[::-1]
    rows = rows.assign(
        kind=["across spans" if key else "in a span" for key in rows["key_span"]],
        name=[
            escaped(f"{edge} at {span}" + (f" from {key}" if key else ""))
            for edge, span, key in zip(rows["edge"], rows["span"], rows["key_span"], strict=True)
        ],
    )
    figure = go.Figure()
    for color, name, some in classes(rows, "kind"):
        figure.add_bar(
            x=some["value"],
            y=some["name"],
            orientation="h",
            name=name,
            marker={"color": color},
            error_x=whiskers(some["value"], some["low"], some["high"]),
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
        )
    figure.update_xaxes(title=f"{result.metric} that is lost without it")
    figure.update_yaxes(
        showgrid=False, tickfont={"size": 10}, categoryorder="array", categoryarray=rows["name"]
    )
    title = f"{result.task}: what is needed where"
    return style(figure, escaped(title), look, height=140 + 20 * len(rows))


@draws("PositionEvaluation")
def position_curves(result: PositionEvaluation, **look: Unpack[Look]) -> go.Figure:
    """Faithfulness of circuits of edges at places, of edges everywhere, and of random ones, by size.

    Example:
        >>> scores = lens.circuits.scores.positions(small, copying, {"first": (1, 26)}, method="eap")
        >>> figure = lens.circuits.checks.evaluate_positions(small, copying, scores, [0.05, 0.2]).plot()
    """
    figure = go.Figure()
    for color, name, rows in classes(result.table(), "by"):
        figure.add_scatter(
            x=rows["kept"],
            y=rows["faithfulness"],
            name=name,
            mode="lines+markers",
            line={"color": color},
            error_y=bars(rows, "faithfulness", plain=True),
            hovertemplate=f"{name}: %{{x:.2%}} kept, faithfulness %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title="share of (edge, token) pairs kept", type="log", tickformat="~%")
    figure.update_yaxes(title="faithfulness")
    title = f"Circuits at places on {result.task} ({result.model})"
    return style(figure, escaped(title), look)
