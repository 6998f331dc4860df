"""Figures of what explains a head: the matrix of query parts × key parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.choices import check_counts
from lens.common.colors import DIVERGING, scale
from lens.common.plots import draws
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.reading.explanations import Explanation, PairExplanation


@draws("Explanation", "PairExplanation")
def parts_matrix(
    result: Explanation | PairExplanation, top: int = 12, **look: Unpack[Look]
) -> go.Figure:
    """Contrast of the logit, query parts × key parts: those with the largest sums, the others as one row and column.

    Args:
        top: so many parts of each side.

    Raises:
        LensError: a number of parts that is none.

    Example:
        >>> why = lens.reading.explain(small, lens.tasks.copied(small, 12), "L1H0", 18, 7)
        >>> figure = why.plot(top=5)
    """
    check_counts(top=top)
    cells = np.asarray(result.contrast)
    while cells.ndim > 2:  # groups and prompts
        cells = np.nanmean(cells, 0)
    rows, row_names = _largest(result.parts[0], np.abs(cells).sum(1), top)
    columns, column_names = _largest(result.parts[1], np.abs(cells).sum(0), top)
    shown = rows @ cells @ columns.T
    most = float(np.abs(shown).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            x=[escaped(name) for name in column_names],
            y=[escaped(name) for name in row_names],
            colorscale=scale(DIVERGING),
            zmin=-most,
            zmax=most,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "nats", "side": "right"}, "thickness": 12},
            hovertemplate="query: %{y}<br>key: %{x}<br>%{z:+.4f} nats<extra></extra>",
        )
    )
    figure.update_xaxes(title="Written at the key by", tickangle=-40)
    figure.update_yaxes(title="Written at the query by", autorange="reversed")
    title = f"Why {result.head} attends there: logit {shown.sum():+.3g} in parts ({result.model})"
    return style(figure, escaped(title), look, height=140 + 26 * len(row_names))


def _largest(names: tuple[str, ...], sizes: np.ndarray, top: int) -> tuple[np.ndarray, list[str]]:
    """[shown, parts] of 0 and 1 that picks the largest, in their order, and sums the others; their names."""
    kept = np.sort(np.argsort(-sizes, kind="stable")[:top])
    picked = np.eye(len(names))[kept]
    shown = [names[place] for place in kept]
    if len(kept) < len(names):
        rest = np.ones(len(names))
        rest[kept] = 0
        return np.vstack([picked, rest]), [*shown, f"{int(rest.sum())} others"]
    return picked, shown
