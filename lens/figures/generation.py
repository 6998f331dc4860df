"""What heads look at while a model writes, token by token."""

from __future__ import annotations

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import BASELINE
from lens.figures.rows import classes
from lens.figures.style import Look, escaped, style


def written_steps(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Share of attention on the prompt for each token that was written, and that of uniform attention, dashed.

    Args:
        table: with the columns prompt_id, step, token, prompt and prompt_uniform.
    """
    figure = go.Figure()
    for color, name, rows in classes(table, "prompt_id"):
        figure.add_scatter(
            x=rows["step"],
            y=rows["prompt"],
            text=[escaped(repr(token)) for token in rows["token"]],
            mode="lines+markers",
            line={"color": color},
            name=name,
            hovertemplate="token %{x} %{text}: %{y:.3f} on the prompt<extra></extra>",
        )
        figure.add_scatter(
            x=rows["step"],
            y=rows["prompt_uniform"],
            mode="lines",
            line={"color": BASELINE, "dash": "dash"},
            name=f"{name}, uniform attention",
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_xaxes(title="token that was written", dtick=max(1, len(table) // 16))
    figure.update_yaxes(title="attention on the prompt, mean over heads", range=[0, 1.02])
    return style(figure, "How much heads look back at the prompt, token by token", look, height=340)
