"""Figures of circuit discovery: what smaller circuits cost, and how gates were learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.plots import draws
from lens.common.results import with_ends
from lens.figures.rows import draw_rankings
from lens.figures.style import Look, style

if TYPE_CHECKING:
    from lens.circuits.discovery._acdc import Acdc
    from lens.circuits.discovery._finding import FoundCircuit
    from lens.circuits.discovery._hard_concrete import LearnedMasks


@draws("Acdc")
def loss_over_size(found: Acdc, **look: Unpack[Look]) -> go.Figure:
    """Loss of each threshold's circuit over its number of edges, and the loss of the model."""
    table = found.table()
    figure = go.Figure()
    figure.add_scatter(
        x=table.edges,
        y=table.loss,
        mode="lines+markers",
        customdata=table[["threshold", "runs"]],
        hovertemplate="threshold %{customdata[0]:g}: %{x:,} edges, %{y:.4g}, %{customdata[1]:,} runs",
        showlegend=False,
    )
    figure.add_hline(y=found.whole, line={"dash": "dot", "width": 1}, annotation_text="model")
    figure.update_xaxes(title=f"edges kept of {found.graph.n:,}")
    figure.update_yaxes(title=f"loss ({found.metric})")
    return style(
        figure,
        f"acdc on {found.task}: {len(table)} thresholds",
        look,
        meta={"method": "acdc", "task": found.task, "model": found.model},
    )


@draws("FoundCircuit")
def faithfulness_by_size(found: FoundCircuit, **look: Unpack[Look]) -> go.Figure:
    """Faithfulness of each circuit that was tried over its number of edges, what was asked for, and the chosen one."""
    table, circuit = found.table(), found.circuit
    figure = go.Figure()
    words = "%{x:,} edges between %{customdata[1]:,} parts"
    draw_rankings(figure, table[table.edges > 0], "edges", ["writers"], words)
    chosen = table[table.chosen]
    marker = {"size": 14, "symbol": "circle-open", "line": {"width": 2}}
    figure.add_scatter(
        x=chosen.edges, y=chosen.faithfulness, mode="markers", marker=marker, name="chosen"
    )
    figure.add_hline(y=found.least, line={"dash": "dot", "width": 1}, annotation_text="asked for")
    figure.update_xaxes(title=f"edges kept of {circuit.graph.n:,}")
    low, high = (  # those drawn, and not how far intervals of few prompts go
        pick(pick(table.faithfulness), found.least, edge) for pick, edge in ((min, 0.0), (max, 1.0))
    )
    figure.update_yaxes(range=[low - 0.1 * (high - low), high + 0.1 * (high - low)])
    scores = found.scores
    told = with_ends(chosen.iloc[0], "faithfulness", ".2f", plain=True)
    return style(
        figure,
        f"{scores.method} on {scores.task}: {circuit.n:,} edges, faithfulness {told} on the prompts that chose",
        look,
        meta={"method": scores.method, "task": scores.task, "model": scores.model},
    )


@draws("LearnedMasks")
def training(masks: LearnedMasks, **look: Unpack[Look]) -> go.Figure:
    """Loss of the drawn gates (left axis) and expected sparsity (right axis) over the steps."""
    figure = go.Figure()
    figure.add_scatter(y=masks.losses, mode="lines", name="loss")
    figure.add_scatter(y=masks.sparsities, mode="lines", name="expected sparsity", yaxis="y2")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=f"loss ({masks.metric})")
    figure.update_layout(
        yaxis2={"title": "expected sparsity", "overlaying": "y", "side": "right", "range": [0, 1]}
    )
    return style(
        figure,
        f"gates of {len(masks.log_alpha):,} {masks.over} on {masks.task}",
        look,
        meta={"task": masks.task, "model": masks.model},
    )
