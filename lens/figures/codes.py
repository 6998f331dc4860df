"""The figure of `lens.circuits.codes`: how many codes of its own each head has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from lens.figures.importance import grid
from lens.figures.style import Theme

if TYPE_CHECKING:
    from lens.circuits.codes import CodeScores


def code_map(
    scores: CodeScores,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Layers down, heads across; the number of codes that clean prompts alone use."""
    best = scores.table().iloc[0]
    return grid(
        scores.values,
        f"Most codes of its own: {best['head']} ({best['value']:.3g})",
        unit="codes",
        title=title,
        width=width,
        height=height,
        theme=theme,
        meta={"task": scores.task, "model": scores.model},
    )
