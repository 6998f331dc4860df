"""The figure of `lens.mixers.measure`: the block map of one head, with its sign or without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import DIVERGING, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.style import Look, style

if TYPE_CHECKING:
    from lens.mixers.measures import MixerMeasures


@draws("MixerMeasures")
def mixer_map(
    found: MixerMeasures, head: int = 0, *, signed: bool = True, **look: Unpack[Look]
) -> go.Figure:
    """Blocks of queries down, of keys across: mean over the rows of a block of the mass on a block of keys.

    Args:
        found: of one layer.
        head: which head.
        signed: the mass with its sign, blue below 0; else of absolute values.
        look: title, size and theme.

    Raises:
        LensError: a head that the mixer has not got.
    """
    if not 0 <= head < found.heads:
        raise LensError(
            f"the mixer of layer {found.layer} has heads 0 to {found.heads - 1}, got {head}"
        )
    values = (found.block_mass if signed else found.block_size)[head]
    values = np.where(np.tri(*values.shape, dtype=bool), values, np.nan)
    most = float(np.nanmax(np.abs(values))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            colorscale=scale(DIVERGING if signed else VIRIDIS),
            zmin=-most if signed else 0,
            zmax=most,
            colorbar={"title": "mass" if signed else "absolute mass"},
            hovertemplate="queries of block %{y}, keys of block %{x}: %{z:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="block of keys")
    figure.update_yaxes(title="block of queries", autorange="reversed")
    title = f"L{found.layer}H{head}: {found.kind}, {'signed' if signed else 'absolute'} mass"
    return style(figure, title, look, meta={"figure": "mixer_map", "head": head})
