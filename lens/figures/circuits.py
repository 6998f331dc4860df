"""Figures of `lens.circuits`: scores of all edges, and how faithful circuits of each size are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from lens.figures.colors import DIVERGING, scale
from lens.figures.style import Theme, style

if TYPE_CHECKING:
    from lens.circuits.edge_scores import EdgeScores
    from lens.circuits.evaluation import CircuitEvaluation


def edge_map(
    scores: EdgeScores,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Scores of all edges: writers across, readers down; red = the task goes worse without the edge."""
    graph, values = scores.graph, scores.values
    bound = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=graph.dense(values, np.nan),
            x=graph.writers,
            y=[reader.replace("<", "·").rstrip(">") for reader in graph.readers],
            colorscale=scale(DIVERGING),
            zmin=-bound,
            zmid=0,
            zmax=bound,
            colorbar={"title": {"text": scores.metric, "side": "right"}, "thickness": 12},
            hovertemplate="%{x} to %{y}: %{z:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="writer", showgrid=False)
    figure.update_yaxes(title="reader", autorange="reversed", showgrid=False)
    best = int(np.nanargmax(values))
    name = graph.edges[best].replace("<", "·").replace("->", " to ").rstrip(">")
    return style(
        figure,
        title=title or f"{scores.method} on {scores.task}: most at {name}, {values[best]:.3g}",
        width=width,
        height=height,
        theme=theme,
        meta={"method": scores.method, "task": scores.task, "model": scores.model},
    )


def faithfulness_curve(
    evaluation: CircuitEvaluation,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Faithfulness over the share of edges, with intervals, and the band of random circuits."""
    table = evaluation.table()
    figure = go.Figure()
    once = table[table.ranking == "signed"]
    shares = list(once.share)
    figure.add_scatter(
        x=shares + shares[::-1],
        y=[*once.random_high, *once.random_low[::-1]],
        fill="toself",
        fillcolor="rgba(128,128,128,0.25)",
        line={"width": 0},
        name=f"{len(evaluation.random)} random circuits",
        hoverinfo="skip",
    )
    for ranking, rows in table.groupby("ranking", sort=False):
        figure.add_scatter(
            x=rows.share,
            y=rows.faithfulness,
            error_y={
                "type": "data",
                "array": rows.high - rows.faithfulness,
                "arrayminus": rows.faithfulness - rows.low,
                "thickness": 1,
            },
            mode="lines+markers",
            name=f"{ranking} scores",
            customdata=rows[["edges", "kl"]],
            hovertemplate="%{customdata[0]:,} edges: %{y:.3f}, KL %{customdata[1]:.3g}",
        )
    figure.update_xaxes(title="share of edges kept", type="log", tickformat="~%")
    figure.update_yaxes(title="faithfulness")
    return style(
        figure,
        title=title
        or f"{evaluation.method} on {evaluation.task}: CPR {evaluation.cpr:.3g}, CMD {evaluation.cmd:.3g}",
        width=width,
        height=height,
        theme=theme,
        meta={"method": evaluation.method, "task": evaluation.task, "model": evaluation.model},
    )
