"""Figures of how sinks work: attention parked against what comes from it, tests of kinds, sizes by layer."""

from __future__ import annotations

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.columns import column_scatter
from lens.figures.rows import bars, head_names
from lens.figures.style import Look, named_below, style


@draws("SinkMechanism", of="table")
def mass_and_value(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Sink mass against the norm of what the sink writes, one point per head, coloured by layer.

    Below 1 the sink writes less than other tokens do: the head does little where it parks.

    Args:
        table: of `SinkMechanism`: `layer`, `head`, `alpha`, `drain`.
    """
    figure = go.Figure(
        go.Scatter(
            x=table["alpha"],
            y=table["drain"],
            mode="markers",
            text=head_names(table["layer"], table["head"]),
            marker={
                "color": table["layer"],
                "colorscale": scale(VIRIDIS),
                "size": 8,
                "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12},
            },
            hovertemplate="%{text}: mass %{x:.2f}, writes %{y:.2f}<extra></extra>",
        )
    )
    figure.add_hline(y=1, line={"color": BASELINE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="mean α of the sink", range=[-0.02, 1.02])
    figure.update_yaxes(title="|W_O v| of the sink / of other tokens", rangemode="tozero")
    parked = table[table["alpha"] > 0.3]
    found = (
        f"{len(parked)} of {len(table)} heads park on the sink (α above 0.3); what it writes is {parked['drain'].median():.2f} times what "
        f"others do (their median, {parked['drain'].min():.2f} to {parked['drain'].max():.2f})"
        if len(parked)
        else "No head parks on the sink (α above 0.3)"
    )
    return style(figure, found, look, meta={"figure": "mass_and_value"})


@draws("SinkKinds", of="table")
def kinds_of_sinks(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Attention on the sink against its share in what the head writes, one point per head, coloured by kind.

    Args:
        table: of `SinkKinds`: `layer`, `head`, `mass`, `share`, `kind`.
    """
    words = {"mass": "Attention on the sources", "share": "Share of the output from them"}
    return column_scatter(table, "mass", "share", "kind", labels=words, **look)


def sink_tests(tests: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of the loss in each test, by kind, beside random keys with as much attention.

    Args:
        tests: of `SinkKinds`.
    """
    figure = go.Figure()
    names = [f"{row['kind']} ({row['heads']})" for row in tests.to_dict("records")]
    for (test, rows), color in zip(
        tests.assign(name=names).groupby("test", sort=False),
        (ACCENT, LINE, "#17663a", "#7a3e9d", "#8a5300", BASELINE)[: tests["test"].nunique()],
        strict=True,
    ):
        figure.add_bar(
            x=rows["name"],
            y=rows["delta_loss"],
            name=str(test),
            error_y=bars(rows, "delta_loss"),
            marker={"color": color},
        )
        if rows["control"].notna().any():
            figure.add_bar(
                x=rows["name"],
                y=rows["control"],
                name=f"{test}, random keys",
                marker={"color": color, "pattern": {"shape": "/"}},
            )
    figure.update_xaxes(title="Kind of sink (heads)")
    figure.update_yaxes(title="Change of loss, nats a token")
    return named_below(style(figure, "What each kind of sink is worth", look, height=460))


def sink_origin(origin: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Sizes of the sources over the median of other positions, by layer, on a logarithmic axis.

    Args:
        origin: of `SinkKinds`.
    """
    figure = go.Figure()
    words = {
        "norm": "state",
        "variance": "variance of the heads' output",
        "gradient": "gradient",
        "value_gradient": "gradient by the values",
    }
    for (column, name), color in zip(
        words.items(), (ACCENT, "#17663a", LINE, "#7a3e9d"), strict=True
    ):
        figure.add_scatter(
            x=origin["layer"],
            y=origin[column],
            name=name,
            mode="lines+markers",
            line={"color": color},
        )
    figure.add_hline(y=1, line={"color": BASELINE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Sources / median of other positions", type="log")
    return named_below(style(figure, "Where the sink comes from", look, height=420))
