"""The figure of `lens.traces.alignment`: how well each head of the cross-attention aligns target and source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.style import Look, escaped

if TYPE_CHECKING:
    from lens.traces.alignment import Alignment


@draws("Alignment")
def alignment_map(found: Alignment, **look: Unpack[Look]) -> go.Figure:
    """Layers down, heads across: accuracy of the strongest key, or its monotonicity where there are no labels."""
    name = "accuracy" if found.labelled else "monotonicity"
    wide = found.table().pivot(index="layer", columns="head", values=name)
    return grid(
        wide.to_numpy(),
        f"{escaped(found.model)}: {name} of the strongest key",
        look,
        unit=name,
        layers=wide.index,
        signed=not found.labelled,
        most=1,
        meta={"figure": "alignment_map", "model": found.model},
    )
