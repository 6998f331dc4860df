"""Two runs against each other: A and B as axes, and the difference of every head as a grid."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.common.results import ends
from lens.figures.grids import grid
from lens.figures.heads import label
from lens.figures.rows import bars, classes
from lens.figures.style import Look, escaped, named_below, style
from lens.runs.schema import KIND_WORDS
from lens.stats.verdicts import leave_out_0
from lens.traces.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lens.runs import Comparison
    from lens.runs.comparison.series import RunSeries

_ON_COPIES = ("induction", "duplicate_token", "previous_token")
_NAMED = 5


@draws("Comparison")
def comparison_scatter(
    comparison: Comparison,
    metric: str = "induction",
    variant: str = "raw",
    prompts: str | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Every head as a point, its score in A across and in B up, with the line on which they are equal.

    Heads whose difference lies beyond its interval are set off; the farthest have their names.

    Args:
        comparison: of `lens.runs.compare_runs`.
        metric, variant: of `lens.traces.metrics`.
        prompts: `text` or `copied`; None: the kind that shows the metric best.

    Raises:
        LensError: heads are not compared, or no such score.
    """
    rows, kind = _select(comparison, metric, variant, prompts)
    names = rows["name"].to_numpy()
    differs = leave_out_0(rows["low"], rows["high"]).to_numpy()
    farthest = set(np.argsort(-np.abs(rows["difference"].fillna(0).to_numpy()))[:_NAMED].tolist())
    ends = _ends(rows)
    figure = go.Figure(
        go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            name="equal in both",
            line={"color": BASELINE, "dash": "dot", "width": 1},
            hoverinfo="skip",
        )
    )
    for chosen, name, color, symbol in (
        (~differs, "head", LINE, "circle"),
        (differs, "differs beyond its interval", ACCENT, "diamond"),
    ):
        if not chosen.any():
            continue
        part = rows[chosen]
        figure.add_scatter(
            x=part["a"],
            y=part["b"],
            mode="markers+text",
            name=name,
            text=[
                names[index] if index in farthest and differs[index] else ""
                for index in np.flatnonzero(chosen)
            ],
            textposition="top center",
            textfont={"size": 10},
            hovertext=[
                _hover(*row)
                for row in zip(
                    names[chosen], part["difference"], part["low"], part["high"], strict=True
                )
            ],
            hovertemplate="%{hovertext}<br>A %{x:.4g}, B %{y:.4g}<extra></extra>",
            marker={
                "size": 8,
                "color": color,
                "symbol": symbol,
                "line": {"width": 1, "color": "white"},
            },
        )
    axis = label(metric, variant)
    figure.update_xaxes(title=f"A: {axis}", range=ends)
    figure.update_yaxes(title=f"B: {axis}", range=ends)
    return style(
        figure,
        _finding(comparison, metric, variant, kind),
        look,
        meta=_meta(comparison, "comparison_scatter", metric, variant, kind),
    )


def difference_grid(
    comparison: Comparison,
    metric: str = "induction",
    variant: str = "raw",
    prompts: str | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """B - A of every head: layers down, heads across, colours centred at 0; arguments as `comparison_scatter`.

    Raises:
        LensError: heads are not compared, or no such score.
    """
    rows, kind = _select(comparison, metric, variant, prompts)
    grids = [
        rows.pivot(index="layer", columns="head", values=name)
        for name in ("difference", "low", "high", "a", "b")
    ]
    values, low, high, a, b = (grid.to_numpy(dtype=float) for grid in grids)
    bound = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    if METRICS[metric].unit == "probability":
        bound = max(bound, 0.1)  # 0.002 must not look like a find
    text = [
        [_hover(f"L{layer}H{head}", *cell) + f"<br>A {cell_a:.4g}, B {cell_b:.4g}"
         for head, *cell, cell_a, cell_b in zip(grids[0].columns, *row, strict=True)]
        for layer, *row in zip(grids[0].index, values, low, high, a, b, strict=True)
    ]  # fmt: skip
    return grid(
        values,
        _finding(comparison, metric, variant, kind),
        look,
        unit=f"B - A, {METRICS[metric].unit}",
        layers=grids[0].index,
        heads=grids[0].columns,
        signed=True,
        most=bound,
        text=text,
        hover="%{text}",
        meta=_meta(comparison, "difference_grid", metric, variant, kind),
    )


def _select(
    comparison: Comparison, metric: str, variant: str, prompts: str | None
) -> tuple[pd.DataFrame, str]:
    if comparison.refusal:
        raise LensError(f"{comparison.refusal} There is no difference of a head to draw.")
    table = comparison.heads
    rows = table[(table["metric"] == metric) & (table["variant"] == variant)]
    rows = rows[rows["difference"].notna()]
    kind = _kind(rows, "difference", metric, prompts)
    if kind is None:
        on = f" on {prompts}" if prompts is not None else ""
        known = ", ".join(dict.fromkeys(table.loc[table["difference"].notna(), "metric"]))
        raise LensError(
            f"no head has a difference of {metric!r} ({variant}){on}; compared are: {known}"
        )
    return rows[rows["prompts"] == kind], kind


def _kind(rows: pd.DataFrame, column: str, metric: str, prompts: str | None) -> str | None:
    """The kind of prompt that is drawn: the one that is asked for, else the one that shows the metric best; None where
    the column has no value of it."""
    have = list(dict.fromkeys(rows.loc[rows[column].notna(), "prompts"]))
    if prompts is None:
        best = "copied" if metric in _ON_COPIES else "text"
        prompts = best if best in have else next(iter(have), None)
    return prompts if prompts in have else None


def _ends(rows: pd.DataFrame) -> list[float]:
    """Of both axes: all values with a margin."""
    low = min(0.0, float(rows[["a", "b"]].min().min()))
    high = float(rows[["a", "b"]].max().max())
    margin = 0.05 * (high - low) or 1.0
    return [low - margin, high + margin]


def _hover(name: str, difference: float, low: float, high: float) -> str:
    return f"{name}: B - A {difference:.4g}{ends(low, high)}"


def _finding(comparison: Comparison, metric: str, variant: str, kind: str) -> str:
    table = comparison.metrics
    chosen = (
        (table["metric"] == metric) & (table["variant"] == variant) & (table["prompts"] == kind)
    )
    row = table[chosen].iloc[0]
    without = ", sink excluded" if variant == "sink_excluded" else ""
    changed = (
        f"most changed {row['largest']}, {row['largest_difference']:+z.3g}"
        if row["largest"]
        else "no head differs"
    )
    rank = row["rank_correlation"]
    order = "" if np.isnan(rank) else f"; rank correlation {rank:.2f}"
    return escaped(f"{METRICS[metric].label}{without} on {KIND_WORDS[kind]}: {changed}{order}")


def _meta(
    comparison: Comparison, figure: str, metric: str, variant: str, kind: str
) -> dict[str, Any]:
    return {
        "figure": figure,
        "a": comparison.a.id,
        "b": comparison.b.id,
        "metric": metric,
        "variant": variant,
        "prompts": kind,
    }


@draws("RunSeries")
def series_lines(
    series: RunSeries,
    metric: str = "induction",
    variant: str = "raw",
    prompts: str | None = None,
    top: int = 8,
    heads: Sequence[str] = (),
    **look: Unpack[Look],
) -> go.Figure:
    """The heads that change most over a series of runs: their score at each, with its interval over prompts.

    Args:
        series: of `lens.runs.compare_series`.
        metric, variant: of `lens.traces.metrics`.
        prompts: `text` or `copied`; None: the kind that shows the metric best.
        top: so many heads; the others are drawn thin and grey, at most 200.
        heads: these instead, such as L1H2.

    Raises:
        LensError: no such score.
    """
    rows = series.heads[(series.heads["metric"] == metric) & (series.heads["variant"] == variant)]
    kind = _kind(rows, "value", metric, prompts)
    if kind is None:
        raise LensError(
            f"no run of the series has {metric!r} ({variant}) on {prompts or 'any prompts'}"
        )
    rows = rows[rows["prompts"] == kind]
    grid = rows.pivot(index="name", columns="place", values="value")
    parts = _same_heads(series, list(map(int, grid.columns)))
    spans = pd.concat([grid[part].max(axis=1) - grid[part].min(axis=1) for part in parts], axis=1)
    order = pd.DataFrame({"spread": spans.max(axis=1), "value": grid.max(axis=1)})
    spread = order.sort_values(["spread", "value"], ascending=False, kind="stable")["spread"]
    shown = [place for part in parts for place in [part[0], *part]][1:]  # a gap between the parts
    gaps = np.cumsum([0, *(len(part) + 1 for part in parts[:-1])])[1:] - 1
    lines: list[dict[str, Any]] = []
    colors = iter((ACCENT, LINE, "#22a884", "#8250df", "#8a5300", "#17663a", "#5c6773", "#1f5a96"))
    chosen = set(heads or spread.index[:top])
    low, high = (
        rows.pivot(index="name", columns="place", values=f"value_{end}") for end in ("low", "high")
    )
    drawn = np.stack([one[shown].to_numpy(float) for one in (grid, grid - low, high - grid)])
    for name in sorted(spread.index[:200], key=lambda name: (name in chosen, spread[name])):
        named = name in chosen
        color = next(colors, LINE) if named else BASELINE
        own, below, above = drawn[:, grid.index.get_loc(name)]
        line = {
            "type": "scatter",
            "x": [series.names[place] for place in shown],
            "y": _with_gaps(own, gaps),
            "mode": "lines+markers" if named else "lines",
            "name": str(name),
            "showlegend": named,
            "opacity": 1.0 if named else 0.35,
            "line": {"color": color, "width": 2 if named else 1},
            "hovertemplate": f"{name} at %{{x}}: %{{y:.4g}}<extra></extra>",
        }
        if named:
            ends = {"array": above, "arrayminus": below, "thickness": 1, "width": 3}
            line["error_y"] = ends | {"visible": True}
        lines.append(line)
    figure = go.Figure(lines)  # at once: one by one they would take several times as long
    figure.update_xaxes(title="run", type="category")
    figure.update_yaxes(title=label(metric, variant))
    first = spread.index[0]
    most = grid.loc[first, parts[int(np.nanargmax(spans.loc[first]))]]
    title = f"{first} changes most: {most.min():.2f} to {most.max():.2f}"
    if max(map(len, parts)) < 2:
        title = "No two neighbours have the same heads"
    elif spread.iloc[0] == 0:
        title = "No head changes between neighbours"
    meta = {"metric": metric, "variant": variant, "prompts": kind}
    return named_below(style(figure, title, look, meta=meta))


def _same_heads(series: RunSeries, places: list[int]) -> list[list[int]]:
    """The places of a series in pieces of which neighbours have the same heads."""
    parts = [places[:1]]
    for before, place in pairwise(places):
        way = pairwise(series.names[before : place + 1])  # over runs that lack the score, too
        if any(pair in series.refused for pair in way):
            parts.append([])
        parts[-1].append(place)
    return parts


def _with_gaps(values: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """The values of a line that is broken at some of its points."""
    values[gaps] = np.nan
    return values


def first_token_curves(series: RunSeries, **look: Unpack[Look]) -> go.Figure:
    """What the first token gets of the attention of all heads, run by run, beside uniform attention and the highest head with random weights.

    Args:
        series: of `lens.runs.compare_series`.

    Example:
        >>> from lens.runs.comparison.pictures import first_token_curves
        >>> figure = first_token_curves(lens.runs.compare_series([run, other]))
    """
    figure = go.Figure()
    for color, kind, rows in classes(series.sinks, "prompts"):
        words = KIND_WORDS[kind]
        for column, name, dash in (
            ("mass", words, "solid"),
            ("uniform", f"{words}, uniform attention", "dot"),
            ("random_weights", f"{words}, random weights", "dash"),
        ):
            if rows[column].isna().all():
                continue
            figure.add_scatter(
                x=rows["run"],
                y=rows[column],
                mode="lines+markers" if column == "mass" else "lines",
                name=name,
                line={"color": color, "dash": dash, "width": 2 if column == "mass" else 1},
                error_y=bars(rows, "mass") if column == "mass" else None,
                hovertemplate=f"{name} at %{{x}}: %{{y:.1%}}<extra></extra>",
            )
    figure.update_xaxes(title="run", type="category")
    figure.update_yaxes(title="attention to the first token", tickformat=".0%", rangemode="tozero")
    return named_below(style(figure, "Attention to the first token, mean of all heads", look))
