"""Figures of `lens.heads.similarity` and of its clusters: which heads are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, DIVERGING, GRID, LINE, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.style import Look, style
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    from lens.heads.likeness.head_similarity import HeadSimilarity
    from lens.heads.likeness.redundancy import HeadClusters

MOST_HEADS, MOST_WITH_INTERVALS = 512, 256
"""A figure stays below 2 MB: of more heads those with the closest partner are drawn."""
_LABEL = {
    "js": "JS divergence (nats)",
    "log_odds": "cosine of log-odds",
    "cka": "CKA of outputs",
}


@draws("HeadSimilarity")
def similarity_map(
    similarity: HeadSimilarity, clusters: HeadClusters | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Heads × heads; in the order of the clusters with their edges drawn, if clusters are given.

    A divergence is dark where heads are alike; a cosine is red where they are. Of more than 512 heads
    the 512 with the closest partner are drawn, and the title says so.
    """
    is_divergence = similarity.method == "js"
    order = np.arange(len(similarity.names)) if clusters is None else clusters.order
    order = order[np.isin(order, _closest(similarity))]
    square = np.ix_(order, order)
    names = [similarity.names[index] for index in order]
    limits: dict[str, Any] = (
        {"zmin": 0, "zmax": float(np.log(2))}
        if is_divergence
        else {"zmin": -1, "zmid": 0, "zmax": 1}
    )
    hover = "%{y} and %{x}: %{z:.4g}"
    if similarity.n > 1 and len(order) <= MOST_WITH_INTERVALS:
        low, high = similarity.interval()
        limits["customdata"] = np.stack([low[square], high[square]], -1).astype(np.float32)
        hover += "<br>95 % interval %{customdata[0]:.3g} to %{customdata[1]:.3g}"
    figure = go.Figure(
        go.Heatmap(
            z=similarity.values[square].astype(np.float32),
            x=names,
            y=names,
            colorscale=scale(VIRIDIS if is_divergence else DIVERGING),
            colorbar={
                "title": {"text": _LABEL[similarity.method], "side": "right"},
                "thickness": 12,
            },
            hovertemplate=hover + "<extra></extra>",
            hoverongaps=False,
            **limits,
        )
    )
    if clusters is not None:
        for first, last in _runs(clusters.labels[order]):
            figure.add_shape(
                type="rect",
                x0=first - 0.5,
                x1=last + 0.5,
                y0=first - 0.5,
                y1=last + 0.5,
                line={"color": ACCENT, "width": 2},
            )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return style(
        figure,
        _finding(similarity) + _left_out(len(order), len(similarity.names)),
        look,
        height=480,
        meta={
            "figure": "similarity_map",
            "by": similarity.method,
            "variant": "sink_excluded" if similarity.sink_excluded else "raw",
            "exactness": similarity.exactness,
            "model": similarity.model,
        },
    )


def _finding(similarity: HeadSimilarity) -> str:
    without = ", sink excluded" if similarity.sink_excluded else ""
    bound = "" if similarity.exactness == "exact" else f", {similarity.exactness}"
    closest, table = "a single head, no pairs", similarity.table().dropna(subset="value")
    least, most = similarity.bounds
    for nearest in table[:1].to_dict("records"):
        told = of_many_told(
            nearest, "value", ".3g", len(table), similarity.n, plain=True, least=least, most=most
        )
        closest = f"closest {nearest['first']} and {nearest['second']}, {told}"
    return f"{_LABEL[similarity.method]}{without}{bound}: {closest}"


def _closest(similarity: HeadSimilarity) -> np.ndarray:
    """The heads that are drawn, by their number."""
    closeness = similarity.closeness.astype(float)
    np.fill_diagonal(closeness, np.nan)
    best = np.nan_to_num(closeness, nan=-np.inf).max(1)
    return np.argsort(-best, kind="stable")[:MOST_HEADS]


def _left_out(drawn: int, heads: int) -> str:
    return f" (the {drawn} of {heads} heads with the closest partner)" if drawn < heads else ""


def _runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """First and last place of each run of one label that is longer than one."""
    edges = np.flatnonzero(np.diff(labels)) + 1
    parts = np.split(np.arange(len(labels)), edges)
    return [(int(part[0]), int(part[-1])) for part in parts if len(part) > 1]


@draws("HeadClusters")
def dendrogram(clusters: HeadClusters, **look: Unpack[Look]) -> go.Figure:
    """Which heads merge at which distance (Ward's method); the dashed line is where it was cut."""
    place = {int(head): float(at) for at, head in enumerate(clusters.order)}
    tops = dict.fromkeys(place, 0.0)
    figure = go.Figure()
    heads = len(place)
    for step, (left, right, distance) in enumerate(clusters.merges):
        left, right = int(left), int(right)
        x = [place[left], place[left], place[right], place[right]]
        y = [tops[left], distance, distance, tops[right]]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": LINE, "width": 1.5},
                hovertemplate=f"merged at {distance:.3g}<extra></extra>",
                showlegend=False,
            )
        )
        place[heads + step] = (place[left] + place[right]) / 2
        tops[heads + step] = float(distance)
    figure.add_hline(y=clusters.cut, line={"color": GRID, "dash": "dash"})
    names = [clusters.names[int(head)] for head in clusters.order]
    figure.update_xaxes(tickvals=list(range(heads)), ticktext=names, showgrid=False)
    figure.update_yaxes(title="distance", rangemode="tozero")
    count = len(clusters.members)
    return style(
        figure,
        f"{heads} heads of {clusters.model} in {count} clusters by {clusters.method}",
        look,
        meta={"figure": "dendrogram", "by": clusters.method, "model": clusters.model},
    )
