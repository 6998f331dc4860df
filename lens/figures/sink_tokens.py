"""Figures of tokens that stand out: massive activations and high norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE
from lens.common.plots import draws
from lens.figures.style import Look, style

if TYPE_CHECKING:
    from lens.sinks.activations.massive import MassiveActivations
    from lens.sinks.activations.norms import HighNormTokens


@draws("MassiveActivations")
def magnitudes(result: MassiveActivations, **look: Unpack[Look]) -> go.Figure:
    """The three largest |h| and the median after each layer, means over prompts, logarithmic."""
    layers = np.arange(-1, result.median.shape[1] - 1)
    figure = go.Figure()
    for rank, color in enumerate((ACCENT, LINE, "#22a884")):
        figure.add_scatter(
            x=layers, y=result.top[..., rank].mean(0), line={"color": color}, name=f"top {rank + 1}"
        )
    figure.add_scatter(
        x=layers, y=result.median.mean(0), line={"color": BASELINE, "dash": "dot"}, name="median"
    )
    figure.update_xaxes(title="After layer (-1: embedding)")
    figure.update_yaxes(title="|activation|", type="log")
    text = f"Largest activations (BOS {result.bos}, n = {len(result.tokens)})"
    return style(figure, text, look)


@draws("HighNormTokens")
def norm_histogram(result: HighNormTokens, **look: Unpack[Look]) -> go.Figure:
    """Histogram of the tokens' log10 norms, with the cutoff where there is one."""
    known = result.norms[~np.isnan(result.norms)]
    figure = go.Figure(go.Histogram(x=np.log10(known), nbinsx=60, marker={"color": LINE}))
    if not np.isnan(result.cutoff):
        figure.add_vline(x=np.log10(result.cutoff), line={"color": ACCENT, "dash": "dot"})
    figure.update_xaxes(title=f"log10 norm after layer {result.layer}")
    figure.update_yaxes(title="Tokens")
    text = f"Norms of {len(known)} tokens"
    return style(figure, text, look)
