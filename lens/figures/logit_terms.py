"""Figures of the terms of logits: how much of each head's attention rests on content and on position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens.common.colors import DIVERGING, VIRIDIS, scale
from lens.common.plots import draws
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    from lens.reading.logit_terms import LogitTerms


@draws("LogitTerms")
def logit_terms(result: LogitTerms, **look: Unpack[Look]) -> go.Figure:
    """Of every head the attention that lies elsewhere without each term; of a chosen head its logits, term by term.

    Example:
        >>> config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32)
        >>> tiny = lens.load(transformers.BloomModel(config).eval())
        >>> figure = lens.reading.disentangle(tiny, [[1, 5, 9, 2]], "L0H1").plot()
    """
    figure = make_subplots(1, len(result.terms), subplot_titles=result.terms, shared_yaxes=True)
    if result.logits is None:
        shown = np.moveaxis(result.change.mean(-1), -1, 0)
        hover = "%{y}H%{x}<br>%{z:.1%} lies elsewhere<extra></extra>"
        rows: Any = [f"L{layer}" for layer in result.layers]
        colors = {"colorscale": scale(VIRIDIS), "cmin": 0, "cmax": 1}
        colors["colorbar"] = {"title": "changed", "tickformat": ".0%"}
        axis = "Head"
        title = f"Attention that lies elsewhere without each term ({result.model})"
    else:
        # a row's constant changes no attention
        shown = result.logits - np.nanmean(result.logits, -1, keepdims=True)
        hover = "query %{y}, key %{x}<br>%{z:.3g} nats<extra></extra>"
        rows = None
        reach = float(np.nanmax(np.abs(shown), initial=0)) or 1.0
        colors = {"colorscale": scale(DIVERGING), "cmin": -reach, "cmax": reach}
        colors["colorbar"] = {"title": "nats"}
        axis = "Key"
        title = f"Terms of the logits of {result.head}, each row about its mean ({result.model})"
    for column, cells in enumerate(shown, 1):
        figure.add_heatmap(
            z=cells, y=rows, coloraxis="coloraxis", hovertemplate=hover, row=1, col=column
        )
    figure.update_layout(coloraxis=colors)
    figure.update_xaxes(title=axis)
    figure.update_yaxes(autorange="reversed")
    return style(figure, escaped(title), look)
