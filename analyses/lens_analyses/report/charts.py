"""The interactive figures of a report, as plain plotly JSON that shares one template."""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from lens.common.colors import ACCENT, BASELINE, LINE
from lens.figures import metric_by_layer
from lens.figures.heads import plain_grids
from lens.figures.small import small
from lens.figures.style import band, style
from lens.runs.first_screen import Shown
from lens.runs.schema import KIND_WORDS
from lens.runs.sections import Section

_COLORS = {"text": LINE, "copied": ACCENT, "picture": LINE, "sound": LINE}
_GRID = "grid/copied/induction/raw"
_TICKS = 15
_TITLE = 64  # characters of a title that a figure beside another has room for


def template() -> dict[str, Any]:
    """The layout template of all figures, which plotly would repeat in each."""
    return pio.templates["plotly_white"].to_plotly_json()


def charts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> plotly figure: `grid/<prompts>/<metric>/<variant>`, `sinks/<prompts>`, `sensitivity`.

    Args:
        data: the report's numbers.
    """
    if not data["heads"]:
        return {}
    heads = pd.DataFrame(data["heads"]).rename(columns={"prompts": "prompt_id"})
    heads = heads.astype(dict.fromkeys(("value", "low", "high"), float))
    made: dict[str, dict[str, Any]] = {}
    layers = data["setup"]["model"]["layers"]
    height = min(720, max(260, 120 + 26 * layers))
    for kind, rows in heads.groupby("prompt_id", sort=False):
        scored = rows["value"].notna().groupby([rows["metric"], rows["variant"]]).any()
        pairs = dict.fromkeys(zip(rows["metric"], rows["variant"], strict=True))
        shown = sorted(pairs, key=lambda pair: not scored[pair])  # those first
        if kind == "picture":
            shown = [pair for pair in shown if scored[pair]]  # the others are of rows of tokens
        for pair, grid in plain_grids(rows, shown, height=height).items():
            made["/".join(("grid", str(kind), *pair))] = slim(grid)
        trend = metric_by_layer(
            rows,
            "sink_mass",
            title=f"Attention that the first token receives, on {KIND_WORDS[str(kind)]}",
            height=320,
        )
        trend.update_xaxes(dtick=-(-layers // _TICKS), range=[-0.6, layers - 0.4])
        made[f"sinks/{kind}"] = slim(trend.to_plotly_json())
    made["sensitivity"] = slim(_sensitivity(data["sinks"]).to_plotly_json())
    return made


def section_charts(sections: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
    """`section/<section>/<figure>` -> the figures of sections, as they were saved."""
    return {
        f"section/{name}/{part}": slim(figure.to_plotly_json())
        for name, section in sections.items()
        for part, figure in section.figures.items()
    }


def pictures(shown: Sequence[Shown]) -> dict[str, dict[str, Any]]:
    """`headline/<number>` -> the small pictures of the first screen."""
    return {
        f"headline/{number}": bare(one.picture.to_plotly_json())
        for number, one in enumerate(shown)
        if one.picture is not None
    }


def only_picture(figures: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """What a first screen without headlines shows, in words and small: the first figure of an analysis, or the grid."""
    names = [
        name for name in figures if name.startswith("section/") and _has_numbers(figures[name])
    ]
    names += [_GRID] * (_GRID in figures) + [name for name in figures if name.startswith("grid/")]
    for name in names:
        title = figures[name]["layout"]["title"]["text"].replace("<br>", " ")
        return title, bare(small(go.Figure(figures[name])).to_plotly_json())
    return None


def _has_numbers(figure: Mapping[str, Any]) -> bool:
    """Whether anything is drawn: of a patch that has nothing to move every number is missing."""
    for trace in figure["data"]:
        values = trace.get("z", trace.get("y"))
        if isinstance(values, Mapping):  # plotly's form of numbers in a file
            values = np.frombuffer(b64decode(values["bdata"]), values["dtype"])
        if values is not None and pd.notna(np.asarray(values)).any():
            return True
    return False


def _sensitivity(sinks: dict[str, Any]) -> go.Figure:
    """Sink rate against its threshold, with the interval over prompts as a band."""
    rows = pd.DataFrame(sinks["sensitivity"])
    figure = go.Figure()
    for kind, part in rows.groupby("prompts", sort=False):
        color = _COLORS[str(kind)]
        banded = part.dropna(subset=["low", "high"])
        if len(banded):
            low, high = banded["low"], banded["high"]
            figure.add_trace(band(banded["epsilon"], low, high, color, opacity=0.15))
        figure.add_scatter(
            x=part["epsilon"],
            y=part["value"],
            mode="lines",
            name=KIND_WORDS[str(kind)],
            line={"color": color, "width": 2},
            hovertemplate="threshold %{x}: %{y:.1%} of heads<extra></extra>",
        )
    figure.add_vline(x=sinks["epsilon"], line={"color": BASELINE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="threshold ε", range=[0, 1])
    figure.update_yaxes(title="share of heads", tickformat=".0%", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return style(figure, "Sink rate by threshold", {"height": 320})


def bare(plain: dict[str, Any]) -> dict[str, Any]:
    """A figure's JSON without the template, which the page adds back."""
    return plain | {"layout": {k: v for k, v in plain["layout"].items() if k != "template"}}


def slim(plain: dict[str, Any]) -> dict[str, Any]:
    """As `bare`, and with margins for the page."""
    plain = bare(plain)
    title = dict(plain["layout"].get("title", {}))
    lines = wrap(title.get("text") or "", _TITLE)
    above = (56 if len(plain["data"]) > 1 else 28) + 17 * len(lines)
    plain["layout"]["margin"] = {"l": 56, "r": 12, "t": above, "b": 44}
    plain["layout"]["title"] = title | {
        "text": "<br>".join(lines),
        "x": 0,  # of the whole figure: the names of rows can be long
        "xref": "container",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 12, "l": 8},
    }
    return plain
