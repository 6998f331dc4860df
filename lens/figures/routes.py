"""Where the text of a vision-language prompt gets what it says, by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import plotly.graph_objects as go

from lens.common.colors import ACCENT, BASELINE, LINE
from lens.common.plots import draws
from lens.figures.style import Look, named_below, style

if TYPE_CHECKING:
    from lens.vision.routes import TextFlow

_LOOKS = {
    "image": ("the image", ACCENT, "solid"),
    "system": ("what comes before it", LINE, "solid"),
    "image_part": ("{count:.3g} image tokens", ACCENT, "dot"),
    "other_part": ("{count:.3g} others", BASELINE, "dot"),
}


@draws("TextFlow")
def text_routes(result: TextFlow, **look: Unpack[Look]) -> go.Figure:
    """Divergence of the predictions of the text without each route, layer by layer.

    Example:
        >>> figure = lens.vision.text_flow(vlm, inputs, progress=False).plot()
    """
    table = result.table()
    figure = go.Figure()
    for route, (words, color, dash) in _LOOKS.items():
        rows = table[(table["route"] == route).to_numpy()]
        if rows["kl"].isna().all():  # a prompt without such tokens
            continue
        figure.add_scatter(
            x=rows["layer"],
            y=rows["kl"],
            mode="lines+markers",
            name=f"without {words.format(count=rows['keys'].iloc[0])}",
            line={"color": color, "dash": dash},
            customdata=rows["mass"],
            hovertemplate="layer %{x}: %{y:.4f} nats, %{customdata:.1%} of the attention<extra></extra>",
        )
    figure.update_xaxes(title="layer" if result.window == 1 else f"first of {result.window} layers")
    figure.update_yaxes(title="KL of the text's predictions (nats)", rangemode="tozero")
    figure = style(figure, "What the text loses without its edges, by layer", look, height=420)
    return named_below(figure).update_layout(margin_b=110)
