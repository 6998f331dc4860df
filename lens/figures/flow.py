"""The figure of `lens.circuits.scores.flow_routes`: the routes of one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.choices import is_whole
from lens.common.colors import ACCENT, BASELINE, LINE
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.style import Look, escaped, style, tick_step

if TYPE_CHECKING:
    from lens.circuits.scores._flow import FlowRoutes

_COLORS = {"residual": BASELINE, "mlp": ACCENT, "heads": LINE}


@draws("FlowRoutes")
def flow_plot(routes: FlowRoutes, prompt: int = 0, **look: Unpack[Look]) -> go.Figure:
    """Edges of one prompt: tokens across, layers up, width by importance; a dot on each edge tells more.

    Raises:
        LensError: a prompt that is not there.
    """
    if not (is_whole(prompt) and 0 <= prompt < routes.n):
        raise LensError(f"there are prompts 0 to {routes.n - 1}, got {prompt}")
    edges = routes.edges[(routes.edges["prompt"] == prompt).to_numpy()]
    figure = go.Figure()
    middle = 0.5 if (routes.edges["sum"] == "mlp").any() else 1.0
    kinds = edges["part"].where(edges["part"].isin(["residual", "mlp"]), "heads")
    for kind, color in _COLORS.items():
        part = edges[(kinds == kind).to_numpy()]
        for level in (1, 2, 4):  # plotly draws one width per trace
            share = part["importance"]
            some = part[
                ((share >= level / 8) | (level == 1)) & ((share < level / 4) | (level == 4))
            ]
            x, y = [], []
            for row in some.to_dict("records"):
                bottom, top = _ends(row, middle)
                x += [row["key"], row["query"], None]
                y += [bottom, top, None]
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": color, "width": level},
                name=kind,
                legendgroup=kind,
                showlegend=level == 1 and len(part) > 0,
                hoverinfo="skip",
            )
        ends = [_ends(row, middle) for row in part.to_dict("records")]
        figure.add_scatter(
            x=(part["key"] + part["query"]) / 2,
            y=[(bottom + top) / 2 for bottom, top in ends],
            mode="markers",
            marker={"color": color, "size": 5},
            customdata=part[["part", "key", "query", "importance"]],
            hovertemplate="%{customdata[0]}: %{customdata[1]} to %{customdata[2]}, "
            "importance %{customdata[3]:.2f}<extra></extra>",
            legendgroup=kind,
            showlegend=False,
        )
    used = sorted({*edges["query"], *edges["key"]})
    tokens = routes.tokens[prompt]
    figure.update_xaxes(
        title="token",
        tickvals=used,
        ticktext=[escaped(f"{place} {tokens[place]}") for place in used],
    )
    figure.update_yaxes(title="layer", tick0=0, dtick=tick_step(routes.per_prompt.shape[0]))
    return style(
        figure,
        f"{escaped(routes.task)}: {len(edges)} edges of at least {routes.threshold:g}",
        look,
        meta={"figure": "flow_plot", "task": routes.task, "model": routes.model, "prompt": prompt},
    )


def _ends(row: dict, middle: float) -> tuple[float, float]:
    """Heights of an edge: a layer's attention ends in its middle, where its MLP begins."""
    bottom = row["layer"] + middle * (row["sum"] == "mlp")
    return bottom, row["layer"] + (middle if row["sum"] == "attention" else 1.0)
