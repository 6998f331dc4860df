"""Figures of reuse across tasks: what two circuits share, and what redirected heads do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.colors import BASELINE, DIVERGING, LINE, scale
from lens.common.plots import draws
from lens.figures.rows import bars
from lens.figures.style import Look, escaped, style
from lens.stats.intervals import known_mean

if TYPE_CHECKING:
    from lens.circuits.reuse._overlap import Overlap
    from lens.circuits.reuse._redirection import Redirection
    from lens.circuits.reuse._transfer import Transfer


@draws("Overlap")
def overlap_plot(overlap: Overlap, **look: Unpack[Look]) -> go.Figure:
    """Each measure beside the middle 95 % of circuits of redrawn prompts (a line, which may lie beside it) and of the null (a
    band)."""
    table = overlap.table().iloc[::-1]
    figure = go.Figure()
    figure.add_bar(
        y=table["measure"],
        x=table["chance_high"] - table["chance_low"],
        base=table["chance_low"],
        orientation="h",
        width=0.5,
        marker={"color": BASELINE, "opacity": 0.35, "line": {"width": 0}},
        name="by chance (95 %)",
        customdata=table[["chance", "chance_low", "chance_high"]],
        hovertemplate="%{y}: by chance %{customdata[0]:.2f} "
        "[%{customdata[1]:.2f}, %{customdata[2]:.2f}]<extra></extra>",
    )
    if len(drawn := table.dropna(subset=["low", "high"])):
        figure.add_scatter(
            x=[at for row in drawn.itertuples() for at in (row.low, row.high, None)],
            y=[at for row in drawn.itertuples() for at in (row.measure, row.measure, None)],
            mode="lines",
            name="of redrawn prompts (95 %)",
            line={"color": LINE, "width": 2},
            hovertemplate="%{y}: of redrawn prompts %{x:.2f}<extra></extra>",
        )
    figure.add_scatter(
        x=table["value"],
        y=table["measure"],
        mode="markers",
        name="found",
        marker={"size": 9, "color": LINE},
        customdata=table[["p"]],
        hovertemplate="%{y}: %{x:.2f}, p %{customdata[0]:.2g}<extra></extra>",
    )
    figure.update_xaxes(title="share in common, or correlation")
    finding = f"{escaped(overlap.names[0])} and {escaped(overlap.names[1])}: {len(overlap.shared)} heads in both"
    return style(
        figure,
        finding,
        look,
        meta={"figure": "overlap_plot", "tasks": list(overlap.names), "null": overlap.kind},
    )


@draws("Redirection")
def redirection_plot(found: Redirection, **look: Unpack[Look]) -> go.Figure:
    """Accuracy as it is and redirected with intervals over prompts, and each control as a point."""
    table = found.table().iloc[:2]
    means = found.accuracy.mean(1)
    figure = go.Figure()
    figure.add_bar(
        x=table["run"],
        y=table["accuracy"],
        marker={"color": [BASELINE, LINE]},
        error_y=bars(table, "accuracy"),
        hovertemplate="%{x}: %{y:.1%}<extra></extra>",
        showlegend=False,
    )
    figure.add_box(
        y=means[2:],
        name="other heads",
        boxpoints="all",
        jitter=0.6,
        pointpos=0,
        fillcolor="rgba(0,0,0,0)",
        line={"width": 0},
        marker={"color": BASELINE, "size": 7},
        text=[", ".join(map(str, heads)) for heads in found.controls],
        hovertemplate="%{text}: %{y:.1%}<extra></extra>",
        showlegend=False,
    )
    figure.update_yaxes(title="accuracy", range=[0, 1.05], tickformat=".0%")
    figure.update_xaxes(type="category")
    finding = (
        f"{len(found.heads)} heads onto {escaped(found.keys)}: {means[0]:.0%} to {means[1]:.0%}, "
        f"other heads {means[2:].mean():.0%}"
    )
    return style(
        figure,
        finding,
        look,
        meta={"figure": "redirection_plot", "task": found.task, "model": found.model},
    )


@draws("Transfer")
def transfer_map(found: Transfer, **look: Unpack[Look]) -> go.Figure:
    """Faithfulness of each circuit (down) on each task (across), and with its heads renamed."""
    drawn = known_mean(found.renamed)
    text = [
        [
            f"{value:.2f}" + f"<br>renamed {other:.2f}" * bool(other == other)
            for value, other in zip(*both, strict=True)
        ]
        for both in zip(found.faithfulness, drawn, strict=True)
    ]
    numbers = range(len(found.tasks)), range(len(found.circuits))
    figure = go.Figure(
        go.Heatmap(
            z=found.faithfulness,
            text=text,
            texttemplate="%{text}",
            colorscale=scale(DIVERGING),
            zmid=0,
            zmin=-1,
            zmax=1,
            colorbar={"title": "faithfulness"},
            hovertemplate="circuit %{y} on task %{x}: %{z:.3g}<extra></extra>",
        )
    )
    names = [[escaped(name) for name in part] for part in (found.tasks, found.circuits)]
    figure.update_xaxes(title="task", tickvals=list(numbers[0]), ticktext=names[0])
    figure.update_yaxes(
        title="circuit of", tickvals=list(numbers[1]), ticktext=names[1], autorange="reversed"
    )
    return style(
        figure,
        "Each circuit on each task: faithfulness, 1 = as good as the whole model",
        look,
        meta={"figure": "transfer_map", "tasks": list(found.tasks), "model": found.model},
    )
