"""Figures of `lens.heads.sublayers`: what sub-layers are worth, and how many can go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.colors import ACCENT, LINE
from lens.common.plots import draws
from lens.figures.rows import bars
from lens.figures.style import Look, style, tick_step
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    from lens.heads.pruning.sublayer_scores import BlockInfluence, GreedyRemoval, SkipSweep


@draws("SkipSweep")
def skip_scatter(sweep: SkipSweep, **look: Unpack[Look]) -> go.Figure:
    """One point per sub-layer: how far the outputs move without it, and what the task loses."""
    table = sweep.table()
    figure = go.Figure()
    for kind, color in (("attention", LINE), ("mlp", ACCENT)):
        rows = table.iloc[[at for at, name in enumerate(sweep.names) if name.endswith(kind)]]
        if not len(rows):
            continue
        figure.add_trace(
            go.Scatter(
                x=rows["distance"],
                y=rows["drop"],
                error_y=bars(rows, "drop"),
                mode="markers+text",
                text=rows["name"].str.split(".").str[0],
                textposition="top center",
                marker={"color": color, "size": 8},
                name=kind,
                hovertemplate="%{text} " + kind + ": %{y:.4g}, distance %{x:.4g}<extra></extra>",
            )
        )
    figure.update_xaxes(title=f"{sweep.distance} between outputs with and without it")
    figure.update_yaxes(title=f"{sweep.metric} lost without it")
    worst = table.iloc[int(table["drop"].to_numpy().argmax())]
    told = of_many_told(worst, "drop", ".3g", len(table), len(sweep.clean))
    return style(
        figure,
        f"{sweep.task}: missed most is {worst['name']}, {told}",
        look,
        meta={"distance": sweep.distance, "task": sweep.task, "model": sweep.model},
    )


@draws("GreedyRemoval")
def removal_curve(removal: GreedyRemoval, **look: Unpack[Look]) -> go.Figure:
    """The task's metric against the number of sub-layers taken out, with its interval."""
    table = removal.table()
    figure = go.Figure(
        go.Scatter(
            x=table["removed"],
            y=table["metric"],
            error_y=bars(table, "metric", plain=True),
            mode="lines+markers",
            line={"color": LINE},
            text=table["name"],
            hovertemplate="%{x} removed, last %{text}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title=f"sub-layers taken out, of {removal.sublayers}", dtick=1)
    figure.update_yaxes(title=removal.metric)
    return style(
        figure,
        f"{removal.task}: {removal.metric} without {len(removal.order)} sub-layers, "
        f"first {removal.order[0]}",
        look,
        meta={"distance": removal.distance, "task": removal.task, "model": removal.model},
    )


@draws("BlockInfluence")
def influence_bars(influence: BlockInfluence, **look: Unpack[Look]) -> go.Figure:
    """One bar per layer: how far it turns the residual stream, with its interval."""
    table = influence.table()
    figure = go.Figure(
        go.Bar(
            x=table["layer"],
            y=table["influence"],
            error_y=bars(table, "influence", plain=True),
            marker={"color": LINE},
            hovertemplate="layer %{x}: %{y:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="layer", dtick=tick_step(len(table)))
    figure.update_yaxes(title="1 - cosine, before and after")
    least = table.iloc[int(table["influence"].to_numpy().argmin())]
    units = influence.per_prompt.shape[1]
    told = of_many_told(least, "influence", ".3g", len(table), units, plain=True, least=0, most=2)
    return style(
        figure,
        f"{influence.task}: layer {least['layer']:.0f} turns the stream least, {told}",
        look,
        meta={"task": influence.task, "model": influence.model},
    )
