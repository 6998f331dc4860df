"""Figures of causal tests of sinks: effects beside controls, doses, and where attention went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens.common.choices import check_choice, is_whole
from lens.common.colors import ACCENT, BASELINE, DIVERGING, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.rows import bars, classes, samples
from lens.figures.style import Look, escaped, style, tick_step

if TYPE_CHECKING:
    from lens.edits.effect_results import Effect
    from lens.sinks.detection.emergences import SinkEmergence

_MEASURES = {
    "delta_loss": "Change of loss (nats)",
    "kl": "KL of the edited from the unedited prediction (nats)",
    "flip_rate": "Share of changed top tokens",
    "excess": "Change of loss beyond the control's (nats)",
    "gain": "How much better the task goes",
    "excess_gain": "Gain beyond the control's",
}


@draws("Effect", "KnockOut", of="table")
def effect_figure(
    table: pd.DataFrame, measure: str = "delta_loss", **look: Unpack[Look]
) -> go.Figure:
    """One measure of an edit with 95 % intervals: a point per condition, or a curve over its amounts.

    Args:
        table: of `lens.effect`.
        measure: "delta_loss", "kl", "flip_rate" or "excess"; of a task "gain" or "excess_gain", too.

    Raises:
        LensError: an unknown measure.
    """
    check_choice("measure", measure, [name for name in _MEASURES if name in table])
    several = table["amount"].nunique() > 1
    return (_curves if several else _points)(table, measure, look)


def _points(table: pd.DataFrame, measure: str, look: Look) -> go.Figure:
    rows = table[table[measure].notna()]
    figure = go.Figure(
        go.Scatter(
            x=rows[measure],
            y=rows["condition"],
            error_x=bars(rows, measure),
            mode="markers",
            marker={"color": ACCENT, "size": 9},
            customdata=rows["mass"],
            hovertemplate="%{y}: %{x:.4f}<br>mass of the keys %{customdata:.3f}<extra></extra>",
        )
    )
    figure.add_vline(x=0, line={"color": BASELINE, "dash": "dot"})
    figure.update_xaxes(title=_MEASURES[measure])
    figure.update_yaxes(autorange="reversed")
    first = table.iloc[0]
    text = f"Edit {first['edit']} of {first['scope']} ({samples(first)})"
    return style(figure, escaped(text), look)


def migration_maps(effect: Effect, prompt: int = 0, **look: Unpack[Look]) -> go.Figure:
    """Alpha before, after, and the difference: layers down, positions across, largest over heads.

    The difference is that of the largest alphas, from -1 to 1.

    Args:
        effect: as `lens.effect` returns it.
        prompt: which of its prompts.

    Example:
        >>> lens.figures.migration_maps(lens.effect(model, texts, lens.edits.Mask("first")))
    """
    if not (is_whole(prompt) and 0 <= prompt < len(effect.alphas)):
        raise LensError(f"prompt must be 0 to {len(effect.alphas) - 1}, got {prompt!r}")
    alpha, edit = effect.alphas[prompt], effect.edit
    known = ~np.isnan(alpha).all(2)
    largest = np.where(known, np.nan_to_num(alpha, nan=-1).max(2), np.nan)  # [2, layers, keys]
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, subplot_titles=("Before", "After", "After - before")
    )
    for row, values in enumerate((*largest, largest[1] - largest[0]), start=1):
        is_map = row < 3
        figure.add_heatmap(
            z=values,
            colorscale=scale(VIRIDIS if is_map else DIVERGING),
            zmin=0 if is_map else -1,
            zmax=1,
            showscale=row != 2,  # before and after have one scale
            colorbar={
                "thickness": 10,
                "len": 0.62 if is_map else 0.34,
                "y": 0.69 if is_map else 0.14,
                "tickvals": [0, 0.5, 1] if is_map else [-1, 0, 1],
            },
            hovertemplate="layer %{y}, key %{x}<br>%{z:.3f}<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_yaxes(title="Layer", autorange="reversed")
    figure.update_xaxes(title="Key position", row=3, col=1)
    text = f"Alpha, largest of each layer's heads, edit {edit}"
    return style(figure, escaped(text), look)


def _curves(table: pd.DataFrame, measure: str, look: Look) -> go.Figure:
    figure = go.Figure()
    for color, condition, rows in classes(table, "condition"):
        if rows[measure].isna().all():
            continue
        figure.add_scatter(
            x=rows["amount"],
            y=rows[measure],
            error_y=bars(rows, measure),
            mode="lines+markers",
            line={"color": color},
            name=condition,
            customdata=rows["mass"],
            hovertemplate="amount %{x}<br>%{y:.4f}<br>mass of the keys %{customdata:.3f}",
        )
    figure.update_xaxes(title="Amount")
    figure.update_yaxes(title=_MEASURES[measure])
    first = table.iloc[0]
    text = f"Edit {first['edit']} ({samples(first)})"
    return style(figure, text, look)


def streaming_curves(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of loss over the number of first keys kept, a curve per number of last ones.

    Args:
        table: `StreamingScores.summary()` of several calls of `lens.heads.streaming`, one below the other.
    """
    figure = go.Figure()
    for color, last, rows in classes(table, "last"):
        figure.add_scatter(
            x=rows["first"],
            y=rows["delta_loss"],
            error_y=bars(rows, "delta_loss"),
            mode="lines+markers",
            line={"color": color},
            name=f"last {last}",
            customdata=rows["kept"],
            hovertemplate="first %{x}<br>%{y:.4f}<br>mass kept %{customdata:.3f}",
        )
    figure.update_xaxes(title="First keys kept")
    figure.update_yaxes(title=_MEASURES["delta_loss"])
    first = table.iloc[0]
    text = f"First and last keys only ({samples(first)})"
    return style(figure, text, look)


@draws("SinkEmergence")
def emergence_curves(result: SinkEmergence, **look: Unpack[Look]) -> go.Figure:
    """Sink rate over layers, a curve per kind of prompt, with 95 % intervals."""
    rows = result.rows[result.rows["layer"].notna()]
    figure = go.Figure()
    for color, condition, some in classes(rows, "condition"):
        figure.add_scatter(
            x=some["layer"],
            y=some["rate"],
            error_y=bars(some, "rate", plain=True),
            mode="lines+markers",
            line={"color": color},
            name=condition,
        )
    figure.update_xaxes(title="Layer", dtick=tick_step(rows["layer"].nunique()))
    figure.update_yaxes(title="Sink rate (share of heads)", range=[-0.02, 1.02])
    first = result.table().iloc[0]
    text = f"Key {first['key']}: alpha > {first['epsilon']:g}"
    return style(figure, text, look)
