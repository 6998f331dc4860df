"""Figures of sinks by head, scope and band: reach of an edit, activity, gates, losses without a band."""

from __future__ import annotations

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.rows import bars, classes, samples
from lens.figures.style import Look, escaped, style

_LOSS = "Change of loss (nats per token)"


def reach_points(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of loss by reach of an edit, a colour per condition, with 95 % intervals.

    Args:
        table: of several calls of `lens.effect`, one below the other; `reach` says which it is of.
    """
    figure = go.Figure()
    for color, condition, rows in classes(table, "condition"):
        figure.add_scatter(
            x=rows["delta_loss"],
            y=rows["scope"] + " (" + rows["reach"] + ")",
            error_x=bars(rows, "delta_loss"),
            mode="markers",
            marker={"color": color, "size": 9},
            name=condition,
            customdata=rows["mass"],
            hovertemplate="%{y}: %{x:.4f}<br>mass of the keys %{customdata:.3f}",
        )
    figure.add_vline(x=0, line={"color": BASELINE, "dash": "dot"})
    figure.update_xaxes(title=_LOSS)
    figure.update_yaxes(autorange="reversed")
    first = table.iloc[0]
    text = f"Edit {first['edit']} by reach ({samples(first)})"
    return style(figure, escaped(text), look)


@draws("HeadActivity", of="table")
def activity_points(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of loss with a head off against its activity: a point per edited head and domain.

    Args:
        table: of `lens.heads.activity`.

    Raises:
        LensError: no head was edited.
    """
    edited = table[table["loss"].notna()]
    if edited.empty:
        raise LensError("the table has no edited head, so there is no change of loss to draw")
    figure = go.Figure()
    for color, domain, rows in classes(edited, "domain"):
        figure.add_scatter(
            x=rows["activity"],
            y=rows["loss"],
            error_y=bars(rows, "loss"),
            mode="markers",
            marker={"color": color, "size": 9},
            name=escaped(domain),
            text=rows["name"],
            hovertemplate="%{text}: activity %{x:.2f}, without it %{y:.4f}",
        )
    figure.add_hline(y=0, line={"color": BASELINE, "dash": "dot"})
    figure.update_xaxes(title="Activity (1 - mean α of the first token)", range=[-0.02, 1.02])
    figure.update_yaxes(title="Δ loss without the head (nats)")
    text = "Activity of heads by domain"
    return style(figure, text, look)


@draws("EffectiveGates", "PersistentMemory", of="table")
def gate_points(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Effective gate of every head over its layer, a colour per mechanism.

    Args:
        table: of `EffectiveGates`.
    """
    figure = go.Figure()
    for color, mechanism, rows in classes(table, "mechanism"):
        figure.add_scatter(
            x=rows["layer"],
            y=rows["gate"],
            mode="markers",
            marker={"color": color, "size": 7, "opacity": 0.7},
            name=mechanism,
            text=rows["name"],
            hovertemplate="%{text}: gate %{y:.3f}",
        )
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Effective gate (1 - mass of the sink)", range=[-0.02, 1.02])
    first = table.iloc[0]
    text = f"What sinks leave of each head's attention ({samples(first)})"
    return style(figure, text, look)


@draws("SpectralBands", of="table")
def energy_curves(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Share of the weights in each band of the unembedding's spectrum, mean over heads, beside chance.

    Args:
        table: of `SpectralBands`.
    """
    chance = table.drop_duplicates("band")
    figure = go.Figure()
    for color, weight, rows in classes(table, "weight"):
        mean = rows.groupby("band")["energy"].mean()
        figure.add_scatter(
            x=mean.index,
            y=mean,
            name=weight,
            mode="lines+markers",
            line={"color": color},
            hovertemplate="band %{x}: %{y:.3f}",
        )
    figure.add_scatter(
        x=chance["band"],
        y=chance["chance"],
        name="by chance",
        mode="lines",
        line={"color": BASELINE, "dash": "dot"},
    )
    figure.update_xaxes(title="Band, strongest first; the last is the weakest")
    figure.update_yaxes(title="Share of the weights, mean over heads", rangemode="tozero")
    return style(figure, "Where weights read and write; dotted: by chance", look)


@draws("BandLosses", of="table")
def band_points(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of loss without each band of the unembedding's spectrum, with 95 % intervals.

    Args:
        table: of `BandLosses`.
    """
    figure = go.Figure(
        go.Scatter(
            x=table["band"],
            y=table["delta_loss"],
            error_y=bars(table, "delta_loss", plain=True),
            mode="lines+markers",
            line={"color": ACCENT},
            name="band",
            hovertemplate="band %{x}: %{y:.4f}<extra></extra>",
        )
    )
    figure.add_scatter(
        x=table["band"],
        y=table["control"],
        error_y=bars(table, "control"),
        mode="lines+markers",
        line={"color": BASELINE, "dash": "dot"},
        name="as many random directions",
        hovertemplate="as many random directions: %{y:.4f}<extra></extra>",
    )
    figure.update_xaxes(title="Band, strongest first; the last is the weakest")
    figure.update_yaxes(title=f"{_LOSS} without it")
    first = table.iloc[0]
    text = f"What each band of the last stream is worth ({samples(first)})"
    return style(figure, text, look)
