"""Figures of what explains a head: query parts × key parts, predicted beside measured, singular components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lens.common.choices import check_choice, check_counts
from lens.common.colors import ACCENT, BASELINE, CLASSES, DIVERGING, LINE, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.rows import bars
from lens.figures.style import Look, band, escaped, named_below, style
from lens.stats.intervals import columns, interval

if TYPE_CHECKING:
    from lens.reading.attributing_blocks import BlockScores
    from lens.reading.directions import SubspaceRemovals
    from lens.reading.explanations import Explanation, PairExplanation
    from lens.reading.judged import Faithfulness
    from lens.reading.removals import Removals
    from lens.reading.retrieved import RetrievalKinds
    from lens.reading.shares import ComponentShares

Curve: TypeAlias = Literal["sufficiency", "comprehensiveness"]
_RANDOM, _ORACLE = "random", "leave_one_out"
_NEAR = 0.05  # of the attention with all parts: such points have their name only under the pointer


@draws("Explanation", "PairExplanation")
def parts_matrix(
    result: Explanation | PairExplanation, top: int = 12, **look: Unpack[Look]
) -> go.Figure:
    """Contrast of the logit, query parts × key parts: those with the largest sums, the others as one row and column.

    Args:
        top: so many parts of each side.

    Raises:
        LensError: a number of parts that is none.

    Example:
        >>> why = lens.reading.explain(small, lens.tasks.copied(small, 12), "L1H0", 18, 7)
        >>> figure = why.plot(top=5)
    """
    check_counts(top=top)
    cells = np.asarray(result.contrast)
    while cells.ndim > 2:  # groups and prompts
        cells = np.nanmean(cells, 0)
    rows, row_names = _largest(result.parts[0], np.abs(cells).sum(1), top)
    columns, column_names = _largest(result.parts[1], np.abs(cells).sum(0), top)
    shown = rows @ cells @ columns.T
    title = f"Why {result.head} attends there: logit {shown.sum():+z.3g} in parts ({result.model})"
    return _matrix(shown, row_names, column_names, escaped(title), look)


def _matrix(
    cells: np.ndarray, rows: list[str], columns: list[str], title: str, look: Look
) -> go.Figure:
    """Query parts down, key parts across."""
    most = float(np.abs(cells).max()) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=[escaped(name) for name in columns],
            y=[escaped(name) for name in rows],
            colorscale=scale(DIVERGING),
            zmin=-most,
            zmax=most,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "nats", "side": "right"}, "thickness": 12},
            hovertemplate="query: %{y}<br>key: %{x}<br>%{z:+.4f} nats<extra></extra>",
        )
    )
    figure.update_xaxes(title="Written at the key by", tickangle=-40)
    figure.update_yaxes(title="Written at the query by", autorange="reversed")
    return style(figure, title, look, height=140 + 26 * len(rows))


def pair_map(pairs: pd.DataFrame, chosen: tuple[int, int], **look: Unpack[Look]) -> go.Figure:
    """Pairs of one prompt: keys across, queries down, one point each by attention; a ring around the chosen one.

    Args:
        pairs: of the section `explain`, of one head.
        chosen: query and key.
    """
    words = [
        f"{escaped(str(row['query_token']))} at {row['query']} → {escaped(str(row['key_token']))} at {row['key']}"
        for row in pairs.to_dict("records")
    ]
    figure = go.Figure(
        go.Scatter(
            x=pairs["key"],
            y=pairs["query"],
            mode="markers",
            text=words,
            marker={
                "size": 14,
                "color": pairs["mass"],
                "colorscale": scale(VIRIDIS),
                "cmin": 0,
                "cmax": 1,
                "colorbar": {"title": {"text": "attention", "side": "right"}, "thickness": 12},
            },
            hovertemplate="%{text}<br>attention %{marker.color:.3f}<extra></extra>",
            showlegend=False,
        )
    )
    ring = {"size": 22, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": ACCENT}}
    figure.add_scatter(
        x=[chosen[1]],
        y=[chosen[0]],
        mode="markers",
        marker=ring,
        hoverinfo="skip",
        showlegend=False,
    )
    most = float(pairs["query"].max())
    figure.add_scatter(
        x=[0, most], y=[0, most], mode="lines", line={"color": LINE, "dash": "dot"}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    figure.update_xaxes(title="Key", rangemode="tozero")
    figure.update_yaxes(title="Query", autorange="reversed")
    return style(figure, "Pairs of the first prompt", look, height=380)


def pair_products(products: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Contrast of one pair, query parts × key parts, those of the section `explain`.

    Args:
        products: of one head and pair: `query_part`, `key_part`, `contrast`.

    Raises:
        LensError: it has no rows, as in a damaged run.
    """
    if products.empty:
        raise LensError("the parts of this pair are not there: the table of products lacks them")
    cells = products.pivot_table(index="query_part", columns="key_part", values="contrast")
    rows = cells.abs().sum(axis=1).sort_values(ascending=False, kind="stable").index
    columns = cells.abs().sum(axis=0).sort_values(ascending=False, kind="stable").index
    title = "Contrast of the parts with the largest sums, nats"
    return _matrix(cells.loc[rows, columns].to_numpy(), list(rows), list(columns), title, look)


@draws("Removals")
def removal_scatter(result: Removals, **look: Unpack[Look]) -> go.Figure:
    """Attention without each part, measured against predicted; the dotted line is where they agree.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(2)]
        >>> figure = lens.reading.removal(small, prompts, "L1H0").plot()
    """
    rows = result.table()
    figure = go.Figure()
    most = float(max(rows["predicted"].max(), rows["measured"].max(), result.clean.mean()))
    figure.add_scatter(
        x=[0, most],
        y=[0, most],
        mode="lines",
        line={"color": BASELINE, "dash": "dot"},
        name="as predicted",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=rows["predicted"],
        y=rows["measured"],
        mode="markers+text",
        text=[
            escaped(name) if abs(left - rows["clean"].iloc[0]) > _NEAR else ""
            for name, left in zip(rows["part"], rows["measured"], strict=True)
        ],
        customdata=[escaped(name) for name in rows["part"]],
        textposition="top center",
        marker={"color": ACCENT, "size": 9},
        name="without the part",
        error_y=bars(rows, "measured") | {"color": ACCENT},
        hovertemplate="%{customdata}<br>predicted %{x:.3f}, measured %{y:.3f}<extra></extra>",
    )
    figure.add_hline(y=result.clean.mean(), line={"color": LINE}, annotation_text="with all parts")
    figure.update_xaxes(title="Attention predicted without the part", range=[-0.03, most + 0.08])
    figure.update_yaxes(title="Attention measured", range=[-0.03, most + 0.08])
    title = (
        f"{result.head} on {result.pairs} without a part of its {result.side} side ({result.model})"
    )
    return style(figure, escaped(title), look)


@draws("ComponentShares")
def component_bars(result: ComponentShares, **look: Unpack[Look]) -> go.Figure:
    """Share of each singular component in the logits and in what the head writes.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(2)]
        >>> figure = lens.reading.components(small, prompts, "L1H0").plot()
    """
    rows = result.table()
    figure = go.Figure()
    for (name, some), color in zip(rows.groupby("map", sort=False), (LINE, ACCENT), strict=True):
        figure.add_bar(
            x=some["component"],
            y=some["share"],
            name=str(name),
            marker={"color": color},
            customdata=some["singular_value"],
            hovertemplate="component %{x}: %{y:.1%}<br>singular value %{customdata:.3g}<extra></extra>",
        )
    figure.update_xaxes(title="Component, largest singular value first")
    figure.update_yaxes(title="Share", tickformat=".0%")
    title = f"What carries {result.head} on {result.pairs} ({result.model})"
    return style(figure, escaped(title), look)


def _largest(names: tuple[str, ...], sizes: np.ndarray, top: int) -> tuple[np.ndarray, list[str]]:
    """[shown, parts] of 0 and 1 that picks the largest, in their order, and sums the others; their names."""
    kept = np.sort(np.argsort(-sizes, kind="stable")[:top])
    picked = np.eye(len(names))[kept]
    shown = [names[place] for place in kept]
    if len(kept) < len(names):
        rest = np.ones(len(names))
        rest[kept] = 0
        return np.vstack([picked, rest]), [*shown, f"{int(rest.sum())} others"]
    return picked, shown


@draws("SubspaceRemovals")
def subspace_bars(result: SubspaceRemovals, **look: Unpack[Look]) -> go.Figure:
    """Attention that is left without the directions, beside every control: to the pairs, and to other pairs.

    Example:
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(4)]
        >>> figure = lens.reading.subspace(small, prompts, "L1H0", rank=4, draws=2).plot()
    """
    rows = result.table()
    figure = go.Figure()
    for column, name, color in (
        ("mass", f"{result.pairs} pairs", ACCENT),
        ("other", f"{result.beside} pairs", LINE),
    ):
        figure.add_bar(
            x=rows["basis"],
            y=rows[column],
            name=name,
            marker={"color": color},
            error_y=bars(rows, column),
            hovertemplate=f"%{{x}}: %{{y:.1%}} to {name}<extra></extra>",
        )
    clean = float(rows["clean"].iloc[0])
    figure.add_hline(y=clean, line={"color": BASELINE}, annotation_text="nothing taken out")
    figure.update_xaxes(title=f"What the {result.rank} of {result.width} directions are")
    figure.update_yaxes(title="Attention that is left", tickformat=".0%", rangemode="tozero")
    return style(
        figure, escaped(f"{result.head} without {result.rank} directions ({result.model})"), look
    )


@draws("RetrievalKinds")
def masked_recall(result: RetrievalKinds, **look: Unpack[Look]) -> go.Figure:
    """Recall of needles without the first heads of each definition, beside as many random others.

    Example:
        >>> trials = lens.tasks.needles.copied(small, n=2, length=30)
        >>> figure = lens.reading.retrieval(small, trials, masked=[1], draws=1).plot()
    """
    rows = result.recall()
    figure = go.Figure()
    colors = (ACCENT, LINE, "#17663a", BASELINE)
    for (name, some), color in zip(rows.groupby("by", sort=False), colors, strict=True):
        figure.add_scatter(
            x=[0, *some["masked"]],
            y=[some["clean"].iloc[0], *some["recall"]],
            name=str(name),
            mode="lines+markers",
            line={"color": color, "dash": "dash" if name == "random" else "solid"},
            error_y={
                "array": [0, *(some["recall_high"] - some["recall"])],
                "arrayminus": [0, *(some["recall"] - some["recall_low"])],
            },
        )
    figure.update_xaxes(title="Heads that give nothing", rangemode="tozero")
    figure.update_yaxes(title="Recall of the needle", range=[-0.02, 1.05])
    return style(figure, escaped(f"Needles without retrieval heads ({result.model})"), look)


@draws("Faithfulness")
def deletion_curves(
    result: Faithfulness, measure: Curve = "sufficiency", **look: Unpack[Look]
) -> go.Figure:
    """Probability lost with the highest tokens alone, or without them, for each method.

    Random order has the band of 95 % of its draws, leave-one-out that of its 95 % bootstrap interval over prompts.

    Args:
        measure: "sufficiency" (with them alone) or "comprehensiveness" (without them).

    Raises:
        LensError: another measure.

    Example:
        >>> found = lens.reading.faithfulness(small, lens.tasks.copied(small, 8), ["raw"], draws=2)
        >>> figure = found.plot("comprehensiveness")
    """
    alone = check_choice("measure", measure, Curve) == "sufficiency"
    curves, shares = getattr(result, measure), list(result.shares)
    figure = go.Figure()
    figure.add_trace(
        band(shares, *interval(result.drawn[:, :, int(alone)].mean(1)), BASELINE, opacity=0.2)
    )
    if _ORACLE in result.methods and curves.shape[1] > 1:
        own = columns("it", curves[result.methods.index(_ORACLE)].T, result.seed)
        figure.add_trace(band(shares, own["it_low"], own["it_high"], LINE, opacity=0.15))
    for place, (name, curve) in enumerate(zip(result.methods, curves.mean(1), strict=True)):
        again, color = divmod(place, len(CLASSES))  # 12 methods
        own = {"color": CLASSES[color], "dash": "dashdot" if again else "solid"}
        bound = {_RANDOM: (BASELINE, "dash"), _ORACLE: (LINE, "dot")}.get(name)
        figure.add_scatter(
            x=shares,
            y=curve,
            name=name,
            mode="lines+markers",
            line=own if bound is None else {"color": bound[0], "dash": bound[1], "width": 3},
            hovertemplate=f"{name}: %{{x:.0%}}, %{{y:.3f}} lost<extra></extra>",
        )
    done = "kept" if alone else "deleted"
    figure.update_xaxes(title=f"Tokens {done} (share)", tickformat=".0%")
    figure.update_yaxes(title="Probability of the answer that is lost")
    words = "with the highest tokens alone" if alone else "without the highest tokens"
    title = f"What the answer loses {words} ({result.model})"
    return named_below(style(figure, escaped(title), look, height=560))


@draws("BlockScores")
def block_bars(result: BlockScores, **look: Unpack[Look]) -> go.Figure:
    """Score of each block of a prompt, its text under the pointer.

    Example:
        >>> found = lens.reading.attribute_blocks(small, lens.tasks.copied(small, 12), "rollout", block=5)
        >>> figure = found.plot()
    """
    rows = result.table()
    figure = go.Figure(
        go.Bar(
            x=rows["first"],
            y=rows["score"],
            width=result.block * 0.9,
            offset=0,
            marker={"color": ACCENT},
            customdata=[escaped(text[:200]) for text in rows["text"]],
            hovertemplate="from token %{x}: %{y:.4g}<br>%{customdata}<extra></extra>",
        )
    )
    figure.update_xaxes(title="First token of the block")
    figure.update_yaxes(title=f"{result.method}{' (approximate)' * result.approximate}")
    title = (
        f"What the answer rests on by {result.method}, blocks of {result.block} ({result.model})"
    )
    return style(figure, escaped(title), look)
