"""Figures of `lens.heads.roles` and `lens.heads.retrieval`: which head does what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.given import given_table
from lens.common.plots import draws
from lens.common.results import counted
from lens.figures.grids import grid
from lens.figures.style import Look, style
from lens.stats.verdicts import of_many_told
from lens.traces.metrics import METRICS

if TYPE_CHECKING:
    from lens.heads.behaviour.retrieval import RetrievalScores
    from lens.heads.behaviour.streaming import StreamingScores
    from lens.heads.pruning.gates import StreamingGate

_SHOWN = (
    "previous_token",
    "current_token",
    "duplicate_token",
    "induction",
    "first_token",
    "delimiter",
    "positional",
    "locality",
    "segment",
    "confidence",
)
_HIGHEST = 1000


@draws("HeadRoles", of="table")
def role_map(
    table: pd.DataFrame, *, columns: Sequence[str] | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Heads down, roles across; interval and baseline on hover, blank where not scored.

    Args:
        table: as `HeadRoles.table` returns it.
        columns: which of its scores with intervals, all between 0 and 1; None: the common roles.

    Raises:
        LensError: a column that the table lacks.

    Example:
        >>> lens.figures.role_map(lens.heads.roles(small, lens.tasks.copied(small, 25)).table())
    """
    given_table(table)
    chosen = list(_SHOWN if columns is None else columns)
    ends = [f"{name}_{end}" for name in chosen for end in ("low", "high")]
    if missing := [name for name in (*chosen, *ends) if name not in table]:
        raise LensError(f"the table has no column {', '.join(missing)}")
    values = table[chosen].to_numpy(float)
    hover = [[_detail(row, name) for name in chosen] for _, row in table.iterrows()]
    full = max(320, 14 * len(table) + 140)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[METRICS[name].label if name in METRICS else name for name in chosen],
            y=table["name"],
            zmin=0,
            zmax=1,
            colorscale=scale(VIRIDIS),
            colorbar={"title": {"text": "score", "side": "right"}, "thickness": 12},
            xgap=1,
            ygap=int(full <= _HIGHEST),  # of thinner rows the gaps would be all that is seen
            text=hover,
            hovertemplate="%{y}, %{x}: %{z:.3g}%{text}<extra></extra>",
            hoverongaps=False,
        )
    )
    figure.update_xaxes(showgrid=False, tickangle=-40)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return style(
        figure,
        f"Roles of {len(table)} heads",
        look,
        height=min(full, _HIGHEST),
        meta={"figure": "role_map", "columns": chosen},
    )


def _detail(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = "" if np.isnan(low) else f"<br>95 % interval {low:.3g} to {high:.3g}"
    base = row.get(f"{name}_baseline")
    return interval if base is None else f"{interval}<br>baseline {base:.3g}"


@draws("RetrievalScores")
def retrieval_grid(scores: RetrievalScores, **look: Unpack[Look]) -> go.Figure:
    """Retrieval score of every head: layers down, heads across, 0 to 1."""
    values = scores.values
    table = scores.table()
    best = table.iloc[int(table["retrieval"].to_numpy().argmax())]
    told = of_many_told(best, "retrieval", ".2f", len(table), scores.n, least=0, most=1)
    found = f"Retrieval: most at {best['name']}, {told} ({counted(scores.n, 'trial')})"
    return share_grid(values, found, unit="share of the needle", **look)


def share_grid(values: np.ndarray, found: str, *, unit: str, **look: Unpack[Look]) -> go.Figure:
    """Numbers [layer, head] from 0 on: layers down, heads across; the scale ends at 1 or above.

    `found` is the title where none is given.
    """
    meta = {"figure": "share_grid", "unit": unit}
    most = max(1.0, float(values.max()))
    return grid(values, found, look, unit=unit, signed=False, most=most, meta=meta)


@draws("StreamingScores")
def streaming_grid(scores: StreamingScores, **look: Unpack[Look]) -> go.Figure:
    """Layers × heads, row error of the streaming output."""
    found = f"Row error with {scores.first} first and {scores.last} last keys: {scores.model}"
    return share_grid(scores.row_error.mean(-1), found, unit="relative error", **look)


@draws("StreamingGate")
def gate_grid(gate: StreamingGate, **look: Unpack[Look]) -> go.Figure:
    """Layers × heads, the gate: 1 needs all keys, 0 streams."""
    found = f"Gate: 1 needs all keys, 0 streams ({gate.model})"
    return share_grid(gate.values, found, unit="gate", **look)
