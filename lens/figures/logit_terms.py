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
        change = result.change.mean(-1)
        for column in range(len(result.terms)):
            figure.add_heatmap(
                z=change[:, :, column],
                y=[f"L{layer}" for layer in result.layers],
                coloraxis="coloraxis",
                hovertemplate="%{y}H%{x}<br>%{z:.1%} lies elsewhere<extra></extra>",
                row=1,
                col=column + 1,
            )
        colors: dict[str, Any] = {"colorscale": scale(VIRIDIS), "cmin": 0, "cmax": 1}
        colors["colorbar"] = {"title": "changed", "tickformat": ".0%"}
        figure.update_xaxes(title="Head")
        figure.update_yaxes(autorange="reversed")
        title = f"Attention that lies elsewhere without each term ({result.model})"
        figure.update_layout(coloraxis=colors)
        return style(figure, escaped(title), look)
    # a row's constant changes no attention
    shown = result.logits - np.nanmean(result.logits, -1, keepdims=True)
    reach = float(np.nanmax(np.abs(shown), initial=0)) or 1.0
    for column, cells in enumerate(shown):
        figure.add_heatmap(
            z=cells,
            coloraxis="coloraxis",
            hovertemplate="query %{y}, key %{x}<br>%{z:.3g} nats<extra></extra>",
            row=1,
            col=column + 1,
        )
    colors = {
        "colorscale": scale(DIVERGING),
        "cmin": -reach,
        "cmax": reach,
        "colorbar": {"title": "nats"},
    }
    figure.update_layout(coloraxis=colors)
    figure.update_xaxes(title="Key")
    figure.update_yaxes(autorange="reversed")
    title = f"Terms of the logits of {result.head}, each row about its mean ({result.model})"
    return style(figure, escaped(title), look)
