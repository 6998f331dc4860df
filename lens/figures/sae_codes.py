"""The figure of `lens.circuits.scores.codes`: how many codes of its own each head has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.style import Look

if TYPE_CHECKING:
    from lens.circuits.scores._sae_codes import CodeScores


@draws("CodeScores")
def code_map(scores: CodeScores, **look: Unpack[Look]) -> go.Figure:
    """Layers down, heads across; the number of codes that clean prompts alone use."""
    best = scores.table().iloc[0]
    return grid(
        scores.values,
        f"Most codes of its own: {best['name']} ({best['value']:.3g})",
        look,
        unit="codes",
        meta={"task": scores.task, "model": scores.model},
        signed=True,
    )
