"""Figures of mixers: the block map of a head, all heads beside softmax heads, and weights by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.choices import is_whole
from lens.common.colors import ACCENT, BASELINE, DIVERGING, LINE, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    import pandas as pd

    from lens.mixers.measures import MixerMeasures

_MARKS = ("circle", "diamond", "square", "triangle-up", "cross", "star")


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
    if not (is_whole(head) and 0 <= head < found.heads):
        raise LensError(
            f"the mixer of layer {found.layer} has heads 0 to {found.heads - 1}, got {head}"
        )
    values = (found.block_mass if signed else found.block_size)[head]
    values = np.where(np.tri(*values.shape, dtype=bool), values, np.nan)
    return block_masses(values, f"L{found.layer}H{head}: {found.kind}", signed=signed, **look)


def block_masses(
    values: np.ndarray, name: str, *, signed: bool = True, **look: Unpack[Look]
) -> go.Figure:
    """The block map of one head.

    Args:
        values: [blocks, blocks], NaN above the diagonal.
        name: of the head.
        signed: blue below 0; else from 0 up.
        look: title, size and theme.
    """
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
    title = f"{escaped(name)}, {'signed' if signed else 'absolute'} mass"
    return style(figure, title, look, meta={"figure": "mixer_map", "head": name})


def mixer_heads(table: pd.DataFrame, uniform: float, **look: Unpack[Look]) -> go.Figure:
    """Every head: how far it looks, and how much of it is negative; softmax heads beside.

    Args:
        table: columns `name`, `mixer`, `distance`, `negative_share`, `first_share`, one row per head.
        uniform: distance of uniform attention.
        look: title, size and theme.

    Example:
        >>> q, k, v = torch.randn(3, 2, 40, 4)
        >>> table = lens.mixers.measure(lens.mixers.linear(q, k, v)).table()
        >>> figure = lens.figures.mixers.mixer_heads(table, 39 / 4)
    """
    figure = go.Figure()
    for number, kind in enumerate(dict.fromkeys(table["mixer"])):
        rows = table[table["mixer"] == kind]
        soft = kind == "softmax"
        figure.add_scatter(
            x=rows["distance"],
            y=rows["negative_share"],
            name=escaped(str(kind)),
            mode="markers",
            marker={
                "symbol": "x-thin" if soft else _MARKS[number % len(_MARKS)],
                "size": 9,
                "color": BASELINE if soft else ACCENT if number % 2 == 0 else LINE,
                "line": {"width": 2 if soft else 0, "color": BASELINE},
            },
            text=rows["name"],
            customdata=rows["first_share"],
            hovertemplate="%{text}: %{x:.1f} tokens back, %{y:.1%} negative, first key %{customdata:.1%}"
            f"<extra>{escaped(str(kind))}</extra>",
        )
    figure.add_vline(x=uniform, line={"color": BASELINE, "dash": "dot"})  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(title="tokens back (dotted: uniform attention)")
    figure.update_yaxes(title="negative share", tickformat=".2~%", rangemode="tozero")
    return style(figure, "How far heads look, and how much of it is negative", look, height=380)


def mixer_profile(rows: pd.DataFrame, name: str, **look: Unpack[Look]) -> go.Figure:
    """How the weights of one mixer head fall with distance, with their sign and without.

    Args:
        rows: columns `tokens_back`, `signed`, `absolute`.
        name: of the head.
        look: title, size and theme.

    Example:
        >>> rows = pd.DataFrame({"tokens_back": [0, 1], "signed": [0.5, -0.1], "absolute": [0.5, 0.1]})
        >>> figure = lens.figures.mixers.mixer_profile(rows, "L0H1")
    """
    figure = go.Figure()
    for column, color, shown in (
        ("absolute", LINE, "absolute"),
        ("signed", ACCENT, "with its sign"),
    ):
        figure.add_scatter(
            x=rows["tokens_back"],
            y=rows[column],
            name=shown,
            mode="lines",
            line={"color": color},
            hovertemplate="%{x} tokens back: %{y:.3g}<extra>" + shown + "</extra>",
        )
    figure.update_xaxes(title="tokens back")
    figure.update_yaxes(title="mean weight")
    return style(figure, f"{escaped(name)}: weights by distance", look)
