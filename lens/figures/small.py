"""A figure as a small picture beside a sentence, and a number beside its baseline as a strip."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io as pio

from lens.common.colors import ACCENT, BASELINE, INK
from lens.figures.style import set_axes, set_layout, tick_step

SIZE = 300, 126
_LEAST_TICKS, _MOST_TICKS = 4, 7
_WIDE, _HIGH, _EDGE = 300, 30, 6  # of a strip
_ROOM = 36  # characters below it
_LETTER, _LEAST_LEFT, _MOST_LEFT = 6, 26, 90  # width of a tick's letter; room for ticks of rows


def small(figure: go.Figure) -> go.Figure:
    """A copy of a figure without title, legend, colour bar and names of ticks, as large as `SIZE`."""
    made = _copied(figure)
    made.for_each_trace(_bare)
    width, height = SIZE
    set_layout(
        made.layout,
        {
            "title": None,
            "showlegend": False,
            "width": width,
            "height": height,
            "margin": {"l": 26, "r": 6, "t": 6, "b": 20},
            "font": {"size": 9},
            "updatemenus": (),
            "sliders": (),
            "hovermode": False,
            "dragmode": False,
            "annotations": (),
            **{name: {"showscale": False} for name in made.layout if name.startswith("coloraxis")},
        },
    )
    axis: dict[str, Any] = {
        "title": None,
        "nticks": _LEAST_TICKS,
        "automargin": False,
        "tickfont": {"size": 9},
        "tickangle": 0,
    }
    words = any(_names_along(trace, "x") for trace in made.data)
    set_axes(made, axis | {"showticklabels": False} if words else axis, axis)
    down: Any = list(made.select_yaxes())
    across: Any = list(made.select_xaxes())
    for one in across + down:
        if one.tickvals is not None and len(one.tickvals) > _MOST_TICKS:
            each = tick_step(len(one.tickvals), _MOST_TICKS)
            one.tickvals = one.tickvals[::each]
            if one.ticktext is not None:  # plotly names the first place by the first text
                one.ticktext = one.ticktext[::each]
    beside = [name for one in down for name in one.ticktext or ()]
    beside += [name for trace in made.data for name in _names_along(trace, "y")]
    longest = max((len(name) for name in beside), default=0)
    made.layout.margin.l = min(max(_LEAST_LEFT, _LETTER * (longest + 1)), _MOST_LEFT)
    rows = max((_rows(trace) for trace in made.data), default=0)
    for one in down:
        if isinstance(one.dtick, int | float) and rows / one.dtick > _MOST_TICKS:
            one.dtick = tick_step(rows, _MOST_TICKS)
    return made


def _rows(trace: Any) -> int:
    """Of a grid of numbers; 0 of other marks."""
    if trace.type != "heatmap" or trace.z is None:
        return 0
    packed = isinstance(trace.z, dict)  # plotly's form of numbers in a file
    return int(str(trace.z["shape"]).partition(",")[0]) if packed else len(trace.z)


def _copied(figure: go.Figure) -> go.Figure:
    """A copy; the usual template is left to plotly, which would look a given one through."""
    plain = figure.to_plotly_json()
    usual = pio.templates.default
    if usual and plain["layout"].get("template") == pio.templates[usual].to_plotly_json():
        del plain["layout"]["template"]
    return go.Figure(plain)


def _names_along(trace: Any, axis: Literal["x", "y"]) -> list[str]:
    """The words that stand along an axis; none where it has numbers."""
    along = getattr(trace, axis, None)
    if along is None or isinstance(along, dict):  # plotly's form of numbers in a file
        return []
    return [one for one in along if isinstance(one, str)]


def _bare(trace: Any) -> None:
    """No colour bar, no text on marks, no gaps between cells: of many rows they would be all that is seen."""
    if "showscale" in trace:
        trace.update(showscale=False)
    marker = getattr(trace, "marker", None)
    if marker is not None and "showscale" in marker:
        trace.update(marker={"showscale": False})
    if trace.type == "heatmap":
        trace.update(texttemplate=None, xgap=0, ygap=0)
    elif trace.type == "scatter" and "text" in str(trace.mode):
        trace.update(mode=str(trace.mode).replace("+text", "").replace("text", "markers"))
    elif trace.type == "bar":
        trace.update(texttemplate=None, text=None)


def strip(value: float, low: float, high: float, baseline: float, against: str) -> str:
    """A number with its interval on a line, and its baseline, as an SVG picture of its own.

    Args:
        value, low, high: the number and its interval; NaN ends where there is none.
        baseline: drawn as a dashed line.
        against: what the baseline is.
    """
    ends = [value, baseline, *(end for end in (low, high) if math.isfinite(end))]
    least, most = min(ends), max(ends)
    span = (most - least) or 1.0

    def at(number: float) -> float:
        return round(_EDGE + (number - least) / span * (_WIDE - 2 * _EDGE), 1)

    parts = [
        _line(_EDGE, _WIDE - _EDGE, 10, "#d5dae1", 1),
        f'<line x1="{at(baseline)}" x2="{at(baseline)}" y1="3" y2="17" stroke="{BASELINE}" stroke-width="2" '
        'stroke-dasharray="3 2"/>',
    ]
    if math.isfinite(low) and math.isfinite(high):
        parts.append(_line(at(low), at(high), 10, ACCENT, 3))
    parts.append(f'<circle cx="{at(value)}" cy="10" r="4" fill="{ACCENT}"/>')
    parts += _names(at, value, baseline, against)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDE}" height="{_HIGH}" '
        f'viewBox="0 0 {_WIDE} {_HIGH}">{"".join(parts)}</svg>'
    )


def _names(at: Callable[[float], float], value: float, baseline: float, against: str) -> list[str]:
    """Value and baseline named below the line, each at its own side of it."""
    against = against if len(against) <= _ROOM else f"{against[: _ROOM - 1]}…"
    left, right = f"{baseline:.3g} {against}", f"{value:.3g}"
    if at(baseline) > at(value):
        left, right = right, left
    return [_text(_EDGE, "start", left), _text(_WIDE - _EDGE, "end", right)]


def _line(x1: float, x2: float, y: float, color: str, width: int) -> str:
    return f'<line x1="{x1}" x2="{x2}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, anchor: str, words: str) -> str:
    style = f'font-family="Arial, sans-serif" font-size="10" fill="{INK}"'
    return f'<text x="{x}" y="27" text-anchor="{anchor}" {style}>{html.escape(words)}</text>'
