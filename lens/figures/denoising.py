"""Figures of a diffusion model's attention: a word on the latents with a slider of steps, entropy over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.colors import ACCENT, LINE, VIRIDIS, scale
from lens.common.errors import LensError
from lens.common.plots import draws
from lens.figures.style import Look, band, escaped, style
from lens.stats import quantile
from lens.traces.denoised import QUADRANTS

if TYPE_CHECKING:
    from lens.traces.denoised import Denoising


@draws("Denoising")
def denoising_steps(
    found: Denoising,
    key: int | str | None = None,
    part: str | None = None,
    *,
    heads: Any = "mean",
    **look: Unpack[Look],
) -> go.Figure:
    """Where a word is looked at, one picture a step, chosen by a slider; of a video its frames side by side.

    Args:
        found: what was recorded.
        key: name or number of the word; None: the entropy of each part at each step instead.
        part, heads: as in `Denoising.maps`.
        look: title, size and theme.

    Raises:
        LensError: as `Denoising.maps`.
    """
    if key is None:
        return _entropy(found, look)
    maps = found.maps(key, part, heads=heads)
    if maps.ndim == 4:
        maps = np.concatenate(list(np.moveaxis(maps, 1, 0)), -1)
    largest = float(maps.max()) or 1.0
    figure = go.Figure(
        [
            go.Heatmap(
                z=values,
                visible=number == 0,
                zmin=0,
                zmax=largest,
                colorscale=scale(VIRIDIS),
                colorbar={"title": "mass"},
                hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
            )
            for number, values in enumerate(maps)
        ]
    )
    steps = [
        {
            "label": str(step),
            "method": "update",
            "args": [{"visible": [other == number for other in range(len(maps))]}],
        }
        for number, step in enumerate(found.steps)
    ]
    if len(steps) > 1:
        figure.update_layout(
            sliders=[{"steps": steps, "currentvalue": {"prefix": "step "}, "pad": {"t": 40}}]
        )
    figure.update_xaxes(title="column", constrain="domain")
    figure.update_yaxes(title="row", autorange="reversed", scaleanchor="x")
    word = key if isinstance(key, str) else f"key {key}"
    title = (
        f"{escaped(found.model)}: where the picture looks at {escaped(word)}, {escaped(str(heads))}"
    )
    return style(figure, title, look)


def _entropy(found: Denoising, look: Look) -> go.Figure:
    table = found.table()
    figure = go.Figure()
    for part, rows in table.groupby("part", sort=False):
        mean = rows.groupby("step")["entropy"].mean()
        figure.add_trace(
            go.Scatter(
                x=mean.index,
                y=mean.values,
                mode="lines+markers",
                name=escaped(str(part)),
                hovertemplate="step %{x}: %{y:.2f} nats<extra></extra>",
            )
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="mean entropy of a row (nats)")
    return style(figure, f"{escaped(found.model)}: entropy of its attention, step by step", look)


def denoising_quadrants(found: Denoising, **look: Unpack[Look]) -> go.Figure:
    """Mass of text and picture on each other over the steps, mean over heads; the middle half of the heads shaded.

    Raises:
        LensError: no joint attention.
    """
    table = found.table()
    if table[QUADRANTS[0]].isna().all():
        raise LensError(
            "quadrants are of joint attention, of text and picture together; there is none here"
        )
    figure = go.Figure()
    colors = (LINE, ACCENT)
    for name, color in zip(("text_to_image", "image_to_text"), colors, strict=True):
        rows = table.groupby("step")[name]
        mean = rows.mean()
        low, high = (rows.agg(quantile, share=share) for share in (0.25, 0.75))
        figure.add_trace(band(mean.index, low, high, color, opacity=0.15))
        figure.add_scatter(
            x=mean.index,
            y=mean.values,
            mode="lines+markers",
            name=name.replace("_", " ").replace("image", "picture"),
            line={"color": color},
            hovertemplate="step %{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
        )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="mass", tickformat=".0%", rangemode="tozero")
    title = f"{escaped(found.model)}: text and picture look at each other"
    return style(figure, title, look)
