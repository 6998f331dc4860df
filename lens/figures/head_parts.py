"""Figures of `lens.circuits.head_parts`, how the effect of each head splits, and of `lens.circuits.checks.sink_check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.plots import draws
from lens.figures.rows import bars
from lens.figures.style import Look, style
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    from lens.circuits.checks._sink_check import SinkCheck
    from lens.circuits.patches.head_parts import JoinedHeads

_PARTS = ("pattern", "value", "interaction")


@draws("JoinedHeads")
def parts_plot(joined: JoinedHeads, **look: Unpack[Look]) -> go.Figure:
    """Bars of pattern, value and interaction stacked, and the full effect with its interval."""
    table = joined.table()
    figure = go.Figure()
    for part in _PARTS:
        figure.add_bar(x=table["name"], y=table[part], name=part)
    figure.add_scatter(
        x=table["name"],
        y=table["full"],
        mode="markers",
        name="full effect",
        marker={"symbol": "line-ew-open", "size": 14},
        error_y=bars(table, "full"),
    )
    figure.update_layout(barmode="relative")
    figure.update_yaxes(title=f"lost {joined.metric}")
    best = table.iloc[int(table["full"].abs().to_numpy().argmax())]
    told = of_many_told(best, "full", ".3g", len(table), int(best["n"]))
    finding = (
        f"{best['name']} matters most ({told}): pattern {best['pattern']:.3g}, "
        f"value {best['value']:.3g}"
    )
    meta = {"task": joined.task, "model": joined.model}
    return style(figure, finding, look, meta=meta)


@draws("SinkCheck")
def sink_check_plot(check: SinkCheck, **look: Unpack[Look]) -> go.Figure:
    """Bars of the gain by each edit with intervals over prompts: the circuit's heads beside others."""
    table = check.table()
    figure = go.Figure()
    for name, rows in table.groupby("heads"):
        figure.add_bar(
            x=rows["edit"],
            y=rows["gain"],
            name=f"heads of the {name}" if name == "circuit" else "others of the same layers",
            error_y=bars(rows, "gain"),
        )
    figure.update_layout(barmode="group")
    figure.update_yaxes(title=f"gained {check.metric}")
    excluded, moved = table.loc[table["heads"] == "circuit", "gain"]
    finding = f"Without the first key in {len(check.heads)} heads: gain {excluded:+z.3g}; its mass moved: {moved:+z.3g}"
    meta = {"task": check.task, "model": check.model}
    return style(figure, finding, look, meta=meta)
