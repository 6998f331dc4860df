"""Figures of sparse policies: what they keep for what they cost, head by head, and what a search found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lens.common.choices import check_choice
from lens.common.colors import ACCENT, BASELINE, INK, LINE, VIRIDIS, scale
from lens.common.head_ids import HeadId
from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.rows import bars
from lens.figures.style import Look, escaped, grid_height, style

if TYPE_CHECKING:
    import pandas as pd

    from lens.policies.maps import PolicyMaps
    from lens.policies.policy_search import PolicySearch
    from lens.policies.scores import PolicyScores
    from lens.policies.stability import PolicyStability

_KINDS = {
    "chosen": (ACCENT, "chosen"),
    "oracle": (LINE, "best blocks"),
    "random": (BASELINE, "random blocks"),
}


@draws("PolicyScores")
def policy_recall(
    result: PolicyScores, policy: str | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Recall against density of each policy, beside the best and random blocks; or every head under one policy.

    Args:
        policy: as it writes itself, for a grid of its heads.

    Raises:
        LensError: a policy that was not measured.

    Example:
        >>> found = lens.policies.evaluate(model, texts, lens.policies.AShape(4, 8), block_size=4)
        >>> figure = found.plot("AShape(first=4, last=8)")
    """
    if policy is not None:
        return _grid(result, check_choice("policy", policy, result.policies), look)
    rows = result.summary()
    figure = go.Figure()
    for name, color, symbol, shown in (
        ("random_recall", BASELINE, "x-thin", "as many random blocks"),
        ("oracle_recall", LINE, "line-ew", "as many, best for each row"),
        ("recall", ACCENT, "circle", "kept"),
    ):
        ends: dict[str, Any] = {}
        if name == "recall" and result.n > 1:
            ends["error_y"] = bars(rows, "recall") | {"color": color}
        figure.add_scatter(
            x=rows["density"],
            y=rows[name],
            name=shown,
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 9,
                "color": color,
                "line": {"color": color, "width": 2},
            },
            text=[escaped(one) for one in rows["policy"]],
            hovertemplate="%{text}<br>density %{x:.3f}, %{y:.4f}<extra>" + shown + "</extra>",
            **ends,
        )
    figure.update_xaxes(title="Blocks kept (share)", range=[0, 1.02])
    figure.update_yaxes(title="Attention kept (share)", range=[0, 1.02])
    return style(figure, escaped(f"Attention kept under policies ({result.model})"), look)


def _grid(result: PolicyScores, policy: str, look: Look) -> go.Figure:
    place = result.policies.index(policy)
    recall = result.of("recall")[place].mean(-1)
    error = result.of("output_error")[place].mean(-1)
    return grid(
        recall,
        escaped(f"Attention kept by {policy}, mean {recall.mean():.1%}"),
        look,
        unit="recall",
        cell=26,
        layers=result.layers,
        most=1,
        data=error,
        hover="%{z:.4f}<br>output off by %{customdata:.4f}",
    )


@draws("PolicyMaps")
def policy_map(
    result: PolicyMaps, head: str | None = None, policy: str | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Kept blocks of a head over its exact map.

    Args:
        head: "L1H3"; None: the first.
        policy: as it writes itself; None: the first.

    Example:
        >>> found = lens.policies.maps(model, texts[0], lens.policies.AShape(4, 8), block_size=4)
        >>> figure = found.plot("L1H3", "AShape(first=4, last=8)")
    """
    head = head or str(HeadId(result.layers[0], 0))
    policy = policy or result.policies[0]
    masses, kept = result.of(head, policy)
    return kept_map(masses, kept, result.block_size, f"{head} under {policy}", **look)


def kept_map(
    masses: np.ndarray,
    kept: np.ndarray,
    block_size: tuple[int, int],
    name: str,
    **look: Unpack[Look],
) -> go.Figure:
    """Exact masses of blocks on a log scale; those that are not kept are veiled. The title says what is kept.

    Args:
        masses: [query_blocks, key_blocks], mean over rows, NaN where nothing is seen.
        kept: bool of the same shape.
        block_size: (query_block, key_block), tokens.
        name: what the title begins with.

    Example:
        >>> found = lens.policies.maps(model, texts[0], lens.policies.AShape(4, 8), block_size=4)
        >>> masses, kept = found.of("L1H3", "AShape(first=4, last=8)")
        >>> figure = lens.figures.policies.kept_map(masses, kept, (4, 4), "L1H3")
    """
    seen = ~np.isnan(masses)
    kept = kept & seen
    shown = np.where(seen, np.log10(np.maximum(np.nan_to_num(masses), _FLOOR)), np.nan)
    y, x = (np.arange(count) * size for count, size in zip(masses.shape, block_size, strict=True))
    words = np.where(kept, "kept", "dropped")
    figure = go.Figure(
        [
            go.Heatmap(
                z=shown,
                x=x,
                y=y,
                customdata=np.dstack([np.nan_to_num(masses).astype(object), words.astype(object)]),
                colorscale=scale(VIRIDIS),
                zmin=np.log10(_FLOOR),
                zmax=0,
                hoverongaps=False,
                colorbar={
                    "title": {"text": "mass", "side": "right"},
                    "thickness": 12,
                    "tickvals": [-4, -3, -2, -1, 0],
                    "ticktext": ["≤ 1e-4", "0.001", "0.01", "0.1", "1"],
                },
                hovertemplate="queries from %{y}, keys from %{x}: %{customdata[0]:.4f}, %{customdata[1]}"
                "<extra></extra>",
            ),
            go.Heatmap(
                z=np.where(seen & ~kept, 1.0, np.nan),
                x=x,
                y=y,
                colorscale=[[0, "rgba(255,255,255,0.78)"], [1, "rgba(255,255,255,0.78)"]],
                showscale=False,
                hoverinfo="skip",
                name="dropped",
            ),
        ]
    )
    figure.update_xaxes(title="key", constrain="domain", showgrid=False)
    figure.update_yaxes(title="query", autorange="reversed", scaleanchor="x", showgrid=False)
    totals = np.nansum(masses, 1)
    recall = (np.where(kept, masses, 0).sum(1) / np.maximum(totals, 1e-30))[totals > 0].mean()
    said = f"{name}: {kept.sum() / seen.sum():.1%} of the blocks, {recall:.1%} of the attention"
    return style(figure, escaped(said), look)


_FLOOR = 1e-4


def policy_heads(table: pd.DataFrame, column: str, **look: Unpack[Look]) -> go.Figure:
    """Heads down, policies across: one column of `PolicyScores.table()`.

    Args:
        table: of the heads to show.
        column: of it, a share.

    Example:
        >>> found = lens.policies.evaluate(model, texts, lens.policies.AShape(4, 8), block_size=4)
        >>> figure = lens.figures.policies.policy_heads(found.table(), "recall")
    """
    names = list(dict.fromkeys(table["name"]))
    policies = list(dict.fromkeys(table["policy"]))
    grid = table.pivot(index="name", columns="policy", values=column).loc[names, policies]
    values = grid.to_numpy(float)
    kinds = [one.partition("(")[0] for one in policies]  # the whole name where two are of a kind
    short = [
        kind if kinds.count(kind) == 1 else one for kind, one in zip(kinds, policies, strict=True)
    ]
    spread = not column.endswith("error")
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[escaped(one) for one in short],
            y=names,
            customdata=np.broadcast_to([escaped(one) for one in policies], values.shape),
            colorscale=scale(VIRIDIS),
            zmin=0,
            zmax=1 if spread else None,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": column.replace("_", " "), "side": "right"},
                "thickness": 12,
            },
            hovertemplate="%{y}, %{customdata}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", type="category", dtick=1)
    figure.update_xaxes(tickangle=35, type="category")
    words = column.replace("_", " ")
    return style(
        figure, escaped(f"{words[0].upper()}{words[1:]} by head and policy"), look,
        height=grid_height(len(names), 18) + 130,
    )  # fmt: skip


def policy_runs(table: pd.DataFrame, **look: Unpack[Look]) -> go.Figure:
    """Change of a metric against density, a panel for each task, all rows sparse and from the question on.

    Args:
        table: `PolicyRuns.table()` with the columns `task` and `rows` ("all", "question").

    Example:
        >>> runs = lens.policies.run(model, task, lens.policies.AShape(4, 8), block_size=4, progress=False)
        >>> figure = lens.figures.policies.policy_runs(runs.table().assign(task="induction", rows="all"))
    """
    tasks = list(dict.fromkeys(table["task"]))
    figure = make_subplots(len(tasks), 1, shared_xaxes=True, vertical_spacing=0.12)
    kinds = {
        "all": (ACCENT, "circle", "all rows"),
        "question": (LINE, "diamond", "from the question on"),
    }
    for at, task in enumerate(tasks, 1):
        for kind, (color, symbol, shown) in kinds.items():
            rows = table[(table["task"] == task) & (table["rows"] == kind)]
            figure.add_scatter(
                x=rows["density"],
                y=rows["change"],
                name=shown,
                legendgroup=kind,
                showlegend=at == 1,
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": color},
                error_y=bars(rows, "change") | {"color": color},
                text=[escaped(one) for one in rows["policy"]],
                hovertemplate="%{text}<br>density %{x:.3f}: %{y:+.4f}<extra>" + shown + "</extra>",
                row=at,
                col=1,
            )
        metric = table.loc[table["task"] == task, "metric"].iloc[0]
        figure.add_hline(y=0, line={"color": INK, "dash": "dot"}, row=at, col=1)  # pyright: ignore[reportArgumentType]
        figure.update_yaxes(title=escaped(f"{task}: change of {metric}"), row=at, col=1)
    figure.update_xaxes(
        title="Blocks kept (share of the sparse rows)", range=[0, 1.02], row=len(tasks), col=1
    )
    return style(
        figure, "Text and needles under policies, beside dense", look, height=260 * len(tasks) + 80
    )


@draws("PolicyStability")
def stability_bars(result: PolicyStability, **look: Unpack[Look]) -> go.Figure:
    """Attention that the blocks of another condition keep, beside the own best ones and random ones."""
    rows = result.summary()
    figure = go.Figure()
    for name, color, symbol, shown in (
        ("random_recall", BASELINE, "x-thin", "random blocks"),
        ("own_recall", LINE, "line-ew", "own best blocks"),
        ("recall", ACCENT, "circle", "blocks of the other"),
    ):
        figure.add_scatter(
            x=rows["condition"],
            y=rows[name],
            name=shown,
            mode="markers",
            marker={
                "symbol": symbol,
                "size": 10,
                "color": color,
                "line": {"color": color, "width": 2},
            },
            error_y=bars(rows, name) | {"color": color},
            hovertemplate="%{x}: %{y:.4f}<extra>" + shown + "</extra>",
        )
    figure.update_yaxes(title="Attention kept (share)", range=[0, 1.02])
    figure.update_xaxes(title="Where the blocks come from")
    text = f"The best {result.share:.0%} of the blocks, used elsewhere ({result.model})"
    return style(figure, escaped(text), look)


@draws("PolicySearch")
def policy_curve(result: PolicySearch, **look: Unpack[Look]) -> go.Figure:
    """Change of loss on held-out prompts against density, beside random and best blocks; the chosen level marked."""
    curve = result.curve()
    figure = go.Figure()
    for kind, (color, shown) in _KINDS.items():
        rows = curve[curve["kind"] == kind]
        figure.add_scatter(
            x=rows["density"],
            y=rows["loss_change"],
            name=shown,
            mode="lines+markers",
            line={"color": color},
            error_y=bars(rows, "loss_change") | {"color": color},
            customdata=rows["tolerance"],
            hovertemplate="density %{x:.3f}: %{y:+.4f} nats<br>tolerance %{customdata:g}<extra>"
            + shown
            + "</extra>",
        )
    chosen = curve[(curve["kind"] == "chosen") & (curve["tolerance"] == result.tolerance)]
    figure.add_scatter(
        x=chosen["density"],
        y=chosen["loss_change"],
        mode="markers",
        marker={"symbol": "circle-open", "size": 16, "color": INK, "line": {"width": 2}},
        name="taken",
        hoverinfo="skip",
    )
    figure.add_hline(y=result.asked, line={"color": INK, "dash": "dot"}, annotation_text="allowed")
    figure.update_xaxes(title="Blocks kept (share, mean over heads)")
    figure.update_yaxes(title="Change of loss (nats per token)")
    text = f"Loss of {result.model} when heads run sparse"
    return style(figure, escaped(text), look)
