"""The linked views of a run of pictures: importance of heads, strength by ring, patterns; from the tables of its sections.

The views of Li et al., arXiv 2303.13731: each shows the same heads, and the chosen one is marked in all of them. A link per
head or map, where one is given, is the last of the customdata of its point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from lens.common.colors import ACCENT, BASELINE, LINE
from lens.figures.grids import grid
from lens.figures.style import Look, escaped, style

if TYPE_CHECKING:
    import pandas as pd

NEAR = "near"
_HEIGHT = 380
Link = Callable[[str, str], str]
"""Of the name of a head and of a picture ("" for the one that is shown) where it leads."""


def head_matrix(
    values: pd.DataFrame,
    unit: str,
    text: str,
    chosen: str = "",
    link: Link | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """A number of every head: layers down, heads across.

    Args:
        values: `layer`, `head`, `name`, `value`, one row a head.
        unit: of the value.
        text: the title.
        chosen: head, or layer ("L3"), that is marked.
        link: where a click leads.

    Example:
        >>> found = lens.vision.patch_distance(lens.capture(vit, {"pixel_values": images}, keep_qk=True)).table()
        >>> lens.figures.vision_views.head_matrix(found.assign(value=found["near"]), "share", "near").data[0].z.shape
        (2, 4)
    """
    wide = values.pivot(index="layer", columns="head", values="value")
    names = [[f"L{layer}H{head}" for head in wide.columns] for layer in wide.index]
    figure = grid(
        wide.to_numpy(float),
        escaped(text),
        look,
        unit=unit,
        cell=26,
        layers=wide.index,
        heads=wide.columns,
        data=None if link is None else [[link(one, "") for one in row] for row in names],
    )
    for row, layer in enumerate(wide.index):
        for column, head in enumerate(wide.columns):
            if chosen in (f"L{layer}", f"L{layer}H{head}"):
                ends = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
                figure.add_shape(type="rect", **ends, line={"color": ACCENT, "width": 3})
    return figure


def strength(
    rings: pd.DataFrame, chosen: str, link: Link | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Mass by ring of the chosen heads beside their layer and uniform attention; mass nearby, layer by layer.

    Args:
        rings: table of `lens.vision.rings` of one picture.
        chosen: a head ("L3H5") or a layer ("L3").
        link: where a click on a layer leads.

    Example:
        >>> found = lens.vision.rings(lens.capture(vit, {"pixel_values": images}, keep_qk=True))
        >>> len(lens.figures.vision_views.strength(found.table(), "L1H0").data)
        4
    """
    layer = int(chosen[1:].partition("H")[0])
    of_layer = rings[(rings["layer"] == layer).to_numpy()]
    own = of_layer if "H" not in chosen else of_layer[(of_layer["name"] == chosen).to_numpy()]
    figure = make_subplots(
        1,
        2,
        subplot_titles=("by ring", "rings 0 and 1, by layer"),
        horizontal_spacing=0.1,
    )
    lines = [(own, "mass", chosen, ACCENT, "solid")] if "H" in chosen else []
    lines += [
        (of_layer, "mass", f"mean of layer {layer}", LINE, "solid"),
        (of_layer, "uniform_mass", "uniform", BASELINE, "dot"),
    ]
    for rows, column, name, color, dash in lines:
        mean = rows.groupby("ring")[column].mean()
        figure.add_scatter(
            x=mean.index,
            y=mean,
            name=name,
            mode="lines+markers" if dash == "solid" else "lines",
            line={"color": color, "dash": dash},
            hovertemplate="ring %{x}: %{y:.4f}<extra>%{fullData.name}</extra>",
            row=1,
            col=1,
        )
    near = rings[(rings["ring"] <= 1).to_numpy()].groupby(["layer", "head"])["mass"].sum()
    by_layer = near.groupby("layer").mean()
    places = [f"L{one}" for one in by_layer.index]
    figure.add_scatter(
        x=by_layer.index,
        y=by_layer,
        name="mean over heads",
        mode="lines+markers",
        line={"color": LINE},
        marker={"size": [12 if one == layer else 6 for one in by_layer.index]},
        customdata=None if link is None else [link(one, "") for one in places],
        hovertemplate="layer %{x}: %{y:.3f}<extra></extra>",
        showlegend=False,
        row=1,
        col=2,
    )
    figure.update_xaxes(title="ring", row=1, col=1)
    figure.update_xaxes(title="layer", row=1, col=2)
    figure.update_yaxes(rangemode="tozero")
    figure = style(figure, escaped(f"{chosen}: attention by distance"), look, height=_HEIGHT)
    figure.update_annotations(font_size=11)
    return figure.update_layout(margin={"t": 110}, legend={"y": 1.1})


def pattern_points(
    maps: pd.DataFrame,
    chosen: str,
    prompt: str,
    link: Link | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Every map as a point, a colour per pattern; those of the chosen heads are ringed, that of the picture shown large.

    Args:
        maps: `prompt_id`, `layer`, `name`, `group`, `x`, `y`, a row per map.
        chosen: a head ("L3H5") or a layer ("L3"); prompt: the picture that is shown.
        link: where a click leads.

    Example:
        >>> trace = lens.capture(vit, {"pixel_values": images}, keep_qk=True)
        >>> table = lens.vision.patterns(trace, steps=20, progress=False).table().assign(prompt_id="p000")
        >>> figure = lens.figures.vision_views.pattern_points(table, "L1H0", "p000")
    """
    figure = go.Figure()
    for group, rows in maps.groupby("group"):
        is_own = rows["name"] == chosen if "H" in chosen else rows["layer"] == int(chosen[1:])
        is_here = is_own & (rows["prompt_id"] == prompt)
        data = list(zip(rows["name"], rows["prompt_id"], strict=True))
        figure.add_scatter(
            x=rows["x"],
            y=rows["y"],
            mode="markers",
            name=f"pattern {group}",
            marker={
                "color": qualitative.Dark24[int(str(group)) % 24],
                "size": np.where(is_here, 14, 8),
                "opacity": 0.85,
                "line": {"color": ACCENT, "width": np.where(is_own, 2.5, 0)},
            },
            text=[f"{name} on {picture}" for name, picture in data],
            customdata=None if link is None else [link(*one) for one in data],
            hovertemplate=f"%{{text}}: pattern {group}<extra></extra>",
        )
    figure.update_xaxes(showticklabels=False)
    figure.update_yaxes(showticklabels=False)
    text = f"Every head on every picture by its pattern; {chosen} is ringed"
    return style(figure, escaped(text), look, height=_HEIGHT)
