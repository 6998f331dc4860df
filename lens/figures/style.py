"""The layout that every figure shares."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

from lens.common.colors import GRID, INK
from lens.figures.rows import COLORS

Theme = Literal["light", "dark"]


class Look(TypedDict, total=False):
    """How any figure may be made to look.

    Attributes:
        title: instead of what was found.
        width, height: pixels; as large as the page allows if None.
        theme: "light" or "dark".
    """

    title: str | None
    width: int | None
    height: int | None
    theme: Theme


BARE = "attention-lens-bare"  # a template that says nothing, of figures whose page has one for all
pio.templates[BARE] = go.layout.Template(layout={"meta": BARE})
_COUNTED = re.compile(  # titles of axes
    r"(after )?layer\b|first of \d+ layers|block of |(head|ring|row|column|step)$", re.IGNORECASE
)
_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_FONT = "Inter, 'Helvetica Neue', Arial, sans-serif"


@contextmanager
def untemplated() -> Iterator[None]:
    """Figures made with a template that says nothing, for pages that add one of their own: each copies plotly's several times.

    Of the whole process: not for one that shows figures at the same time.
    """
    usual, pio.templates.default = pio.templates.default, BARE
    try:
        yield
    finally:
        pio.templates.default = usual


def escaped(text: str) -> str:
    """Text of a model or a user that plotly must not take for markup."""
    return text.translate(_MARKUP)


def tick_step(count: int, most: int = 16) -> int:
    """Step between ticks of `count` layers or heads that leaves at most `most` of them."""
    return max(1, -(-count // most))


def grid_height(rows: int, cell: int = 18) -> int:
    """Pixels at which `rows` rows of `cell` pixels and their names can be told apart."""
    return min(760, max(260, 150 + cell * rows))


def grid_axes(figure: go.Figure, layers: int, heads: int, most: int = 32) -> None:
    """Heads across and layers down, with at most `most` ticks on each axis; layers that are names stand one by one.

    Without `category` plotly reads names that are numbers as places: of layers 1, 3 and 5 every other row is drawn.
    """
    across = {"title": {"text": "head"}, "dtick": tick_step(heads, most), "showgrid": False}
    down = {"title": {"text": "layer"}, "dtick": tick_step(layers, most), "showgrid": False}
    rows = [getattr(trace, "y", None) for trace in figure.data]
    if any(y is not None and len(y) and isinstance(y[0], str) for y in rows):
        down["type"] = "category"
    set_axes(figure, across, down | {"autorange": "reversed"})


def set_axes(figure: go.Figure, across: Mapping[str, Any], down: Mapping[str, Any]) -> None:
    """Set these of every x axis and of every y axis."""
    axes: Any
    for axes, values in ((figure.select_xaxes(), across), (figure.select_yaxes(), down)):
        set_layout(figure.layout, {axis.plotly_name: values for axis in axes})


def set_layout(layout: Any, values: Mapping[str, Any]) -> None:
    """As `update_layout`, which takes ten times as long: it looks every path up several times."""
    for name, value in values.items():
        if isinstance(value, Mapping) and (known := layout[name]) is not None:
            known = known if isinstance(known, dict) else known.to_plotly_json()
            value = _merged(known, value)
        layout[name] = value


def _merged(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        name: _merged(known[name], value)
        for name, value in more.items()
        if isinstance(value, Mapping) and isinstance(known.get(name), Mapping)
    }
    return {**known, **more, **inner}


def style(
    figure: go.Figure,
    title: str,
    look: Look,
    *,
    height: int | None = None,
    meta: Mapping[str, Any] | None = None,
) -> go.Figure:
    """Set title, size, theme and provenance of a figure, and return it.

    Args:
        figure: to be changed.
        title: what was found, where `look` has no other.
        look: what the caller asked for.
        height: where `look` has none.
        meta: what the figure was made from.

    Raises:
        TypeError: `look` has another key.
        ValueError: another theme.
    """
    if unknown := look.keys() - Look.__annotations__:
        raise TypeError(
            f"unknown argument {', '.join(sorted(unknown))}; every figure takes "
            f"{', '.join(Look.__annotations__)}"
        )
    theme = look.get("theme", "light")
    if theme not in ("light", "dark"):
        raise ValueError(f"theme must be 'light' or 'dark', got {theme!r}")
    light = theme == "light"
    ink, grid, paper = (INK, GRID, "white") if light else ("#e6e9ee", "#39414d", "#161b22")
    drawn: Any = figure.data
    layout = {
        "title": {
            "text": look.get("title") or title,
            "font": {"size": 13},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 10},
        },
        "width": look.get("width"),
        "height": look.get("height") or height,
        "font": {"family": _FONT, "size": 12, "color": ink},
        "paper_bgcolor": paper,
        "plot_bgcolor": paper,
        "colorway": COLORS,
        "margin": {"l": 60, "r": 20, "t": 60 if len(drawn) > 1 else 40, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        "hoverlabel": {"font": {"family": _FONT}},
        "meta": dict(meta or {}),
    }
    set_layout(figure.layout, layout)
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid, "ticks": ""}
    set_axes(figure, axis, axis)
    _count_by_whole_numbers(figure)
    return figure


def _count_by_whole_numbers(figure: go.Figure) -> None:
    """Axes of layers, heads, blocks and the like, and colour bars of layers: plotly puts halves between few."""
    drawn: Any = figure.data
    axes: Any
    for side, axes in (("x", figure.select_xaxes()), ("y", figure.select_yaxes())):
        for axis in axes:
            if not _COUNTED.match(axis.title.text or "") or axis.dtick or axis.tickvals is not None:
                continue
            name = axis.plotly_name.replace("axis", "")
            own = [_places(one, side) for one in drawn if (one[f"{side}axis"] or side) == name]
            low, high = axis.domain or (0, 1)  # a narrow axis has room for few
            most = max(4, round(16 * (high - low)))
            axis.tickvals = _ticks([one for one in own if one is not None], most)
    for one in drawn:
        shade = one.marker if one.type == "scatter" else None
        if shade is not None and shade.colorbar.title.text == "layer":
            shade.colorbar.tickvals = _ticks([shade.color])


def _places(trace: Any, side: str) -> Any:
    """Where a trace lies along an axis; the rows or columns of a map that does not say it."""
    found = trace[side]
    if found is None and trace.type == "heatmap" and trace.z is not None:
        return np.arange(np.shape(trace.z)[side == "x"])
    return found


def _ticks(several: Sequence[Any], most: int = 16) -> list[int] | None:
    """Whole numbers among these, at most so many; None where they are no numbers."""
    try:
        numbers = np.concatenate([np.asarray(one, dtype=float).ravel() for one in several])
    except ValueError:
        return None
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return None
    low, high = math.ceil(numbers.min()), math.floor(numbers.max())
    step = tick_step(high - low + 1, most)
    return list(range(-(-low // step) * step, high + 1, step))


def band(x: Any, low: Any, high: Any, color: str, *, opacity: float | None = None) -> go.Scatter:
    """The ground between two curves over the same places, without a border or a name."""
    x, low, high = map(np.asarray, (x, low, high))
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=color,
        opacity=opacity,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
    )


def named_below(figure: go.Figure) -> go.Figure:
    """With its legend under the plot: more than four names above it cover the title and leave no room."""
    return figure.update_layout(legend={"y": -0.25, "yanchor": "top"}, margin_t=40)
