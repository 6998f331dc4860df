"""Figures of what attention can be changed by, and of parts by distance and by class of token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.choices import check_counts
from lens.common.colors import ACCENT, BASELINE, CLASSES, LINE
from lens.common.plots import draws
from lens.figures.rows import bars
from lens.figures.style import Look, escaped, named_below, style
from lens.reading._groups import is_offset

if TYPE_CHECKING:
    from lens.reading.explanations import PairExplanation, Side
    from lens.reading.mixtures import MixingRatios
    from lens.reading.robustness import Adversaries, Robustness

_FEW_LAYERS = 16
_TOLD_APART = len(CLASSES)  # heads that have a colour of their own


def part_shares(
    result: PairExplanation, side: Side = "key", top: int = 3, **look: Unpack[Look]
) -> go.Figure:
    """Share of the parts that carry most in the logits of each group of pairs: by offset, or by class of token.

    Args:
        side: "key" or "query".
        top: so many parts, by what they carry in all groups together.

    Raises:
        LensError: another side, or a number of parts that is none.

    Example:
        >>> from lens.figures.reading_changes import part_shares
        >>> prompts = [lens.tasks.copied(small, 12, seed) for seed in range(2)]
        >>> figure = part_shares(lens.reading.explain_pairs(small, prompts, "L1H0", by="offset"))
    """
    check_counts(top=top)
    table = result.side(side)
    weighted = (table["contrast"] * table["pairs"]).abs().groupby(table["part"]).sum()
    shown = weighted.sort_values(ascending=False, kind="stable").index[:top]
    figure = go.Figure()
    numbers = all(map(is_offset, result.groups))
    for place, name in enumerate(shown):
        rows = table[table["part"] == name]
        own = {
            "x": rows["group"].astype(int) if numbers else [escaped(one) for one in rows["group"]],
            "y": rows["share"],
            "name": escaped(name),
            "error_y": bars(rows, "share"),
            "customdata": rows[["pairs", "n"]],
            "hovertemplate": f"{escaped(name)}, %{{x}}: %{{y:.1%}}<br>%{{customdata[0]}} pairs in %{{customdata[1]}} "
            "prompts<extra></extra>",
        }
        color = CLASSES[place % len(CLASSES)]
        if numbers:
            figure.add_scatter(**own, mode="lines+markers", line={"color": color})
        else:
            figure.add_bar(**own, marker={"color": color})
    figure.update_xaxes(title="Query less key, tokens" if numbers else "Query → key")
    figure.update_yaxes(title=f"Share of the logit, {side} side", tickformat=".0%")
    title = (
        f"What carries {result.head} on {result.pairs} by {result.by or 'group'} ({result.model})"
    )
    return named_below(style(figure, escaped(title), look, height=440))


@draws("Robustness")
def robustness_curves(result: Robustness, **look: Unpack[Look]) -> go.Figure:
    """Change of loss against the size of a change of attention logits: along the gradient, and random, of each head.

    Few heads have a colour each, and whiskers of 95 % over prompts.

    Example:
        >>> found = lens.reading.perturb(small, lens.tasks.copied(small, 8), ["L1H0"], sizes=[0.5, 1.0], draws=1)
        >>> figure = found.plot()
    """
    table = result.table()
    few = len(result.heads) <= _TOLD_APART
    words = ("worst pair", "random pairs") if result.along == "pairs" else ("worst", "random")
    figure = go.Figure()
    for place, head in enumerate(result.heads):
        rows = table[table["name"] == str(head)]
        for kind, word, color in zip(("worst", "random"), words, (ACCENT, BASELINE), strict=True):
            line = {"color": CLASSES[place] if few else color}
            if few and kind == "random":
                line["dash"] = "dot"
            figure.add_scatter(
                x=rows["size"],
                y=rows[kind],
                name=f"{head} {word}" if few else word,
                legendgroup=f"{head} {kind}" if few else kind,
                showlegend=few or place == 0,
                mode="lines+markers",
                line=line,
                error_y=bars(rows, kind) if few else None,
                hovertemplate=f"{head}, {word}: size %{{x:g}}, %{{y:+.4f}} nats<extra></extra>",
            )
    figure.update_xaxes(
        title="Size of the change (L2 over the logits of a head, nats)", rangemode="tozero"
    )
    figure.update_yaxes(title="Change of loss (nats)")
    what = "move from token to token" if result.along == "pairs" else "change"
    title = f"Loss when attention logits {what} ({result.model})"
    return named_below(style(figure, escaped(title), look, height=460))


@draws("Adversaries")
def adversary_bars(result: Adversaries, **look: Unpack[Look]) -> go.Figure:
    """How far another row that writes the same is from each head's own, and how far even attention is.

    Example:
        >>> figure = lens.reading.adversary(small, lens.tasks.copied(small, 12), draws=2).plot()
    """
    rows = result.table()
    figure = go.Figure()
    for column, name, color in (
        ("divergence", "another row, same output", ACCENT),
        ("uniform", "even attention", LINE),
    ):
        change = "change" if column == "divergence" else "uniform_change"
        figure.add_bar(
            x=rows["name"],
            y=rows[column],
            name=name,
            marker={"color": color},
            error_y=bars(rows, column),
            customdata=rows[change],
            hovertemplate=f"%{{x}}, {name}: %{{y:.3f}} nats away<br>loss %{{customdata:+.2g}} nats<extra></extra>",
        )
    figure.add_hline(
        y=float(np.log(2)), line={"color": BASELINE, "dash": "dot"}, annotation_text="ln 2"
    )
    figure.update_xaxes(title="Head")
    figure.update_yaxes(title="Divergence from its row, nats", range=[0, 0.75])
    title = f"Other attention that writes the same ({result.model})"
    return named_below(style(figure, escaped(title), look, height=420))


@draws("MixingRatios")
def mixing_lines(result: MixingRatios, **look: Unpack[Look]) -> go.Figure:
    """Share of a token's next state that other tokens bring, layer by layer and measure by measure; dotted: even attention.

    Example:
        >>> figure = lens.reading.mixing(small, lens.tasks.copied(small, 12)).plot()
    """
    figure = go.Figure()
    for place, (measure, rows) in enumerate(result.table().groupby("measure", sort=False)):
        name, color = str(measure).replace("_", ", "), CLASSES[place]
        figure.add_scatter(
            x=rows["layer"],
            y=rows["ratio"],
            name=name,
            legendgroup=name,
            mode="lines+markers",
            line={"color": color},
            error_y=bars(rows, "ratio"),
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.1%}}<extra></extra>",
        )
        figure.add_scatter(
            x=rows["layer"],
            y=rows["uniform"],
            name=f"{name}, even attention",
            legendgroup=name,
            showlegend=False,
            mode="lines",
            line={"color": color, "dash": "dot"},
            hovertemplate=f"{name}, even attention, layer %{{x}}: %{{y:.1%}}<extra></extra>",
        )
    figure.update_xaxes(title="Layer", dtick=1 if len(result.layers) <= _FEW_LAYERS else None)
    figure.update_yaxes(title="Brought by other tokens", tickformat=".0%", range=[0, 1.02])
    title = f"Mixing of tokens, dotted with even attention ({result.model})"
    return named_below(style(figure, escaped(title), look, height=440))
