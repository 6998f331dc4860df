"""The figure of `lens.heads.stability`: which heads keep their pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.rows import head_names, whiskers
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.heads.likeness.stability import HeadStability

_LABEL = {
    "jaccard": "top blocks shared, above chance",
    "jaccard_uniform": "top blocks shared with uniform attention, above chance",
    "recall": "mass on the other's top blocks",
    "efficiency": "recall / own recall",
    "js": "JS divergence of block maps (nats, lower bound)",
    "correlation": "rank correlation of block masses",
    "drift": "mean LSE drift",
    "drift_std": "spread of LSE drift",
    "drift_p99": "99th percentile of |LSE drift|",
    "mass_error_p99": "99th percentile of |exp(drift) - 1|",
}


@draws("HeadStability")
def stability_plot(
    stability: HeadStability, metric: str = "jaccard", variant: str = "raw", **look: Unpack[Look]
) -> go.Figure:
    """One metric of every head with its interval, one series per pair of conditions.

    Raises:
        LensError: a metric that was not measured.
    """
    table = stability.table()
    rows = table[((table["metric"] == metric) & (table["variant"] == variant)).to_numpy()]
    if rows.empty:
        have = ", ".join(dict.fromkeys(table["metric"]))
        raise LensError(f"no {metric!r} ({variant}) was measured; there are {have}")
    figure = go.Figure()
    for (first, second), part in rows.groupby(["first", "second"], sort=False):
        figure.add_trace(
            go.Scatter(
                x=head_names(part["layer"], part["head"]),
                y=part["value"],
                mode="markers",
                name=escaped(f"{first} to {second}"),
                error_y=whiskers(part["value"], part["low"], part["high"]),
                hovertemplate="%{x}: %{y:.3g}<extra></extra>",
            )
        )
    figure.update_xaxes(title="head", type="category")
    figure.update_yaxes(title=_LABEL[metric])
    without = ", first key block and diagonal left out" if variant == "sink_excluded" else ""
    return style(
        figure,
        f"Stability of heads: {_LABEL[metric]}{without}",
        look,
        meta={"figure": "stability_plot", "metric": metric, "variant": variant},
    )
