"""Figures of sinks by head, scope and band: reach of an edit, activity, gates, losses without a band."""

from __future__ import annotations

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.rows import head_names, whiskers
from lens.figures.style import Look, escaped, style

_COLORS = (ACCENT, LINE, "#22a884", "#8250df", BASELINE)
_LOSS = "Change of loss (nats per token)"


def reach_points(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of loss by reach of an edit, a colour per condition, with 95 % intervals.

    Args:
        table: of several calls of `lens.effect`, one below the other; `reach` says which it is of.
    """
    figure = go.Figure()
    for number, (condition, rows) in enumerate(table.groupby("condition", sort=False)):
        figure.add_scatter(
            x=rows["delta_loss"],
            y=[
                f"{scope} ({reach})"
                for scope, reach in zip(rows["scope"], rows["reach"], strict=True)
            ],
            error_x=whiskers(rows["delta_loss"], rows["delta_loss_low"], rows["delta_loss_high"]),
            mode="markers",
            marker={"color": _COLORS[number % len(_COLORS)], "size": 9},
            name=str(condition),
            customdata=rows["mass"],
            hovertemplate="%{y}: %{x:.4f}<br>mass of the keys %{customdata:.3f}",
        )
    figure.add_vline(x=0, line={"color": BASELINE, "dash": "dot"})
    figure.update_xaxes(title=_LOSS)
    figure.update_yaxes(autorange="reversed")
    first = table.iloc[0]
    text = f"Edit {first['edit']} by reach (BOS {first['bos']}, n = {first['n']})"
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
    for number, (domain, rows) in enumerate(edited.groupby("domain", sort=False)):
        figure.add_scatter(
            x=rows["activity"],
            y=rows["loss"],
            error_y=whiskers(rows["loss"], rows["loss_low"], rows["loss_high"]),
            mode="markers",
            marker={"color": _COLORS[number % len(_COLORS)], "size": 9},
            name=escaped(str(domain)),
            text=head_names(rows["layer"], rows["head"]),
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
    for number, (mechanism, rows) in enumerate(table.groupby("mechanism", sort=False)):
        figure.add_scatter(
            x=rows["layer"],
            y=rows["gate"],
            mode="markers",
            marker={"color": _COLORS[number % len(_COLORS)], "size": 7, "opacity": 0.7},
            name=str(mechanism),
            text=rows["name"],
            hovertemplate="%{text}: gate %{y:.3f}",
        )
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Effective gate (1 - mass of the sink)", range=[-0.02, 1.02])
    first = table.iloc[0]
    text = f"What sinks leave of each head's attention (BOS {first['bos']}, n = {first['n']})"
    return style(figure, text, look)


@draws("SpectralBands", of="table")
def energy_curves(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Share of the weights in each band of the unembedding's spectrum, mean over heads, beside chance.

    Args:
        table: of `SpectralBands`.
    """
    count = table["band"].nunique()
    figure = go.Figure()
    for number, (weight, rows) in enumerate(table.groupby("weight", sort=False)):
        mean = rows.groupby("band")["energy"].mean()
        figure.add_scatter(
            x=mean.index,
            y=mean,
            name=str(weight),
            mode="lines+markers",
            line={"color": _COLORS[number % len(_COLORS)]},
            hovertemplate="band %{x}: %{y:.3f}",
        )
    figure.add_hline(y=1 / count, line={"color": BASELINE, "dash": "dot"})
    figure.update_xaxes(title="Band, strongest first; the last is the darkest")
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
            error_y=whiskers(table["delta_loss"], table["low"], table["high"]),
            mode="lines+markers",
            line={"color": ACCENT},
            hovertemplate="band %{x}: %{y:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="Band, strongest first; the last is the darkest")
    figure.update_yaxes(title=f"{_LOSS} without it")
    first = table.iloc[0]
    text = f"What each band of the last stream is worth (BOS {first['bos']}, n = {first['n']})"
    return style(figure, text, look)
