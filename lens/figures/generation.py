"""What heads look at while a model writes, token by token."""

from __future__ import annotations

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import BASELINE
from lens.figures.rows import classes
from lens.figures.style import Look, escaped, style


def written_targets(
    table: pd.DataFrame, column: str, words: str, said: str, **look: Unpack[Look]
) -> go.Figure:
    """A number of each token that an encoder-decoder wrote, and that of uniform attention, dashed.

    Args:
        table: with the columns prompt_id, step, token, `column` and `{column}_uniform`.
        column: which number.
        words, said: of the axis and of the figure.
    """
    figure = go.Figure()
    for color, name, rows in classes(table, "prompt_id"):
        figure.add_scatter(
            x=rows["step"],
            y=rows[column],
            text=[escaped(repr(token)) for token in rows["token"]],
            mode="lines+markers",
            line={"color": color},
            name=name,
            hovertemplate="token %{x} %{text}: %{y:.3f}<extra></extra>",
        )
        figure.add_scatter(
            x=rows["step"],
            y=rows[f"{column}_uniform"],
            mode="lines",
            line={"color": BASELINE, "dash": "dash"},
            name=f"{name}, uniform attention",
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_xaxes(title="token that was written", dtick=max(1, len(table) // 16))
    figure.update_yaxes(title=words, rangemode="tozero")
    return style(figure, said, look, height=340)


def written_steps(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Share of attention on the prompt for each token that was written, and that of uniform attention, dashed.

    Args:
        table: with the columns prompt_id, step, token, prompt and prompt_uniform.
    """
    figure = written_targets(
        table,
        "prompt",
        "attention on the prompt, mean over heads",
        "How much heads look back at the prompt, token by token",
        **look,
    )
    return figure.update_yaxes(range=[0, 1.02])
