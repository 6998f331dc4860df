"""The attention map of one head outside the dashboard: in a notebook, or as a file of its own.

>>> from lens_dashboards.notebook import attention_map
>>> attention_map(trace, 1, 3)                      # in a notebook: the map, which can be zoomed
>>> attention_map(trace, 1, 3).to_html("L1H3.html")  # one file that opens offline

It is the script of the dashboard, with its numbers inside instead of a server behind it. Nothing is
fetched, nothing is shown on import.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from lens.common.errors import LensError
from lens.common.files import on_disk, write_text
from lens.common.head_ids import AnyHead, one_or_more
from lens.common.results import few
from lens.traces.trace import AttentionTrace
from lens_dashboards.raster import MOST_CELLS, Raster, cell_sides, header, of_head, pool, raster
from lens_dashboards.widget import ASSETS, make_widget

if TYPE_CHECKING:
    import plotly.graph_objects as go

_INLINE_CELLS = 160  # a side, of the map that a notebook keeps: about 130 kB
_HEIGHT = 860  # pixels of it
_LINKED_CELLS = 256  # a side, of each of several maps
_SIDE, _ACROSS = 300, 3  # pixels of each, and how many stand side by side
MOST_MAPS = 64
"""Heads that are shown at once."""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main class="page"><h1>{title}</h1>
<p class="small">{caption}</p>
<section class="card"><div class="{layout}">{maps}</div></section>
<section class="card"><h2>Tokens</h2><div id="strip" class="strip"></div></section>
</main>
<script type="application/json" id="held">{held}</script>
<script>{script}</script>
<script>
const held = JSON.parse(document.getElementById("held").textContent);
window.lensBlockMap.open(held, document.querySelectorAll(".map"));
</script>
</body>
</html>
"""


class _Page:
    """Maps with their tokens as one page."""

    maps: Any
    _title: Any
    _cells = _LINKED_CELLS

    @overload
    def to_html(self, path: None = None, *, cells: int | None = None) -> str: ...
    @overload
    def to_html(self, path: str | Path, *, cells: int | None = None) -> None: ...
    def to_html(self, path: str | Path | None = None, *, cells: int | None = None) -> str | None:
        """A page that needs nothing but itself; where a `path` is given it is written there and None returned.

        Args:
            path: of the file.
            cells: most cells a side of each map; what is finer is pooled (the largest), and the page says so.
                None: as many as open quickly, fewer where several maps share a page.

        Raises:
            LensError: fewer than 8 cells, or a file that cannot be written.
        """
        page = _page(self._title, self.maps, self._cells if cells is None else cells)
        if path is None:
            return page
        write_text(on_disk(path), page)
        return None


@dataclass(frozen=True, repr=False, eq=False)
class AttentionMap(_Page):
    """One head of one trace.

    Attributes:
        trace: with block maps; with q and k (`keep_qk=True`) single tokens are shown.
        layer, head: from 0.
        query: token whose row is shown below the map; the last one if None.
    """

    trace: AttentionTrace
    layer: int
    head: int
    query: int | None = None
    _cells = MOST_CELLS

    @property
    def maps(self) -> list[AttentionMap]:
        """This one alone."""
        return [self]

    def plot(self) -> go.Figure:
        """The block map as a plotly figure; see `lens.figures.block_map`."""
        from lens.figures import block_map

        return block_map(self.trace, self.layer, self.head)

    def widget(self) -> Any:
        """A notebook widget that asks this process for each rectangle, exact at every zoom.

        Raises:
            LensError: anywidget is not installed.
        """
        return make_widget(self)

    def _repr_html_(self) -> str:
        return _framed(self.to_html(cells=_INLINE_CELLS), self._title, _HEIGHT)

    def __repr__(self) -> str:
        return f"AttentionMap({self._title}: {self._caption(self._raster(_INLINE_CELLS))})"

    @property
    def _title(self) -> str:
        return f"L{self.layer}H{self.head} of {self.trace.model}"

    @property
    def config(self) -> dict[str, Any]:
        """What the script is told."""
        return {
            "run": "",
            "prompt": "",
            "window": None,
            "query": self.query,
            **of_head(self.trace, self.layer, self.head),
        }

    def _raster(self, cells: int) -> Raster:
        """All of the prompt in at most so many cells a side."""
        if cells < 8:
            raise LensError(f"a map needs at least 8 cells a side, got {cells}")
        found = raster(self.trace, self.layer, self.head)
        down, step = cell_sides(self.trace, found.values.shape, cells)
        if max(step, down) == 1:
            return found
        pooled = pool(found.values, (down, step), "max")
        sides = {"cell": found.cell * step, "query_cell": found.query_cell * down}
        return replace(found, values=pooled, level="pooled", **sides)

    def _caption(self, found: Raster) -> str:
        what = {
            "tokens": "exact probabilities of single tokens",
            "blocks": f"mean mass of blocks of {found.cell} tokens",
            "pixels": f"the largest probability of each {found.cell} × {found.cell} tokens",
            "pooled": f"the largest value of each {found.cell} × {found.cell} tokens",
        }
        of = f"{self.trace.queries} × " if self.trace.cross else ""
        return f"{of}{self.trace.length} tokens, {what[found.level]}"

    def _held(self, found: Raster) -> dict[str, Any]:
        values = np.ascontiguousarray(found.values, dtype="<f4")
        return {
            "config": self.config,
            "header": header(self.trace, found),
            "values": base64.b64encode(values.tobytes()).decode(),
        }


@dataclass(frozen=True, repr=False, eq=False)
class AttentionMaps(_Page):
    """Several heads of one trace, with one zoom, one cursor and one query.

    Attributes:
        maps: of the heads, in the order in which they are shown.
    """

    maps: list[AttentionMap]

    @property
    def _title(self) -> str:
        named = few([f"L{one.layer}H{one.head}" for one in self.maps])
        return f"{named} of {self.maps[0].trace.model}"

    def _repr_html_(self) -> str:
        cells = max(8, min(_INLINE_CELLS, int(_INLINE_CELLS / len(self.maps) ** 0.5)))
        rows = -(-len(self.maps) // _ACROSS)
        return _framed(self.to_html(cells=cells), self._title, 360 + rows * (_SIDE + 150))

    def __repr__(self) -> str:
        return f"AttentionMaps({self._title}: {self.maps[0].trace.length} tokens)"


def view(
    trace: AttentionTrace,
    head: AnyHead | Sequence[AnyHead] | None = None,
    *,
    layer: int | None = None,
    query: int | None = None,
) -> AttentionMap | AttentionMaps:
    """What `AttentionTrace.view` shows.

    Raises:
        LensError: no such head, layer or token; more than `MOST_MAPS` heads.
    """
    if (head is None) == (layer is None):
        raise LensError(
            "view takes a head such as 'L1H3', several, or layer=1; "
            f"got head={head!r} and layer={layer!r}"
        )
    if layer is not None:
        asked: list[Any] = [(layer, number) for number in range(trace.heads)]
    else:
        asked = [*one_or_more("head", head)]
    if not asked:
        raise LensError("no head was named; name some: trace.view(['L1H0', 'L1H1'])")
    if len(asked) > MOST_MAPS:
        raise LensError(
            f"at most {MOST_MAPS} heads are shown at once, got {len(asked)}; name some: "
            "trace.view(['L1H0', 'L1H1'])"
        )
    heads = [trace.head_id(one) for one in asked]
    maps = [attention_map(trace, *one, query=query) for one in heads]
    return maps[0] if len(maps) == 1 else AttentionMaps(maps)


def _page(title: str, maps: list[AttentionMap], cells: int) -> str:
    drawn = [one._raster(cells) for one in maps]
    held = {
        "tokens": maps[0].trace.tokens,
        "side": _SIDE,
        "maps": [one._held(found) for one, found in zip(maps, drawn, strict=True)],
    }
    places = ['<div id="map" class="map"></div>', *['<div class="map"></div>'] * (len(maps) - 1)]
    return _PAGE.format(
        title=html.escape(title),
        caption=html.escape(maps[0]._caption(drawn[0])),
        layout="map-wall" if len(maps) > 1 else "map-alone",
        maps="".join(places),
        style=(ASSETS / "style.css").read_text(encoding="utf-8"),
        script=(ASSETS / "blockmap.js").read_text(encoding="utf-8"),
        held=json.dumps(held).replace("<", "\\u003c"),
    )


def _framed(page: str, title: str, height: int) -> str:
    """A page inside a notebook's."""
    return (
        f'<iframe srcdoc="{html.escape(page, quote=True)}" title="{html.escape(title, quote=True)}" '
        f'style="width:100%;height:{height}px;border:0" sandbox="allow-scripts allow-downloads"></iframe>'
    )


def attention_map(
    trace: AttentionTrace, layer: int, head: int, *, query: int | None = None
) -> AttentionMap:
    """The map of one head, with its tokens below.

    Args:
        trace: of `lens.capture` or of a run.
        layer, head: from 0.
        query: token whose row is shown below the map; the last one if None.

    Raises:
        LensError: a head or a token that is not there.
    """
    raster(trace, layer, head, (0, 1, 0, 1))
    if query is not None and not 0 <= query < trace.queries:
        raise LensError(
            f"the prompt has tokens 0 to {trace.queries - 1}; there is no query {query}"
        )
    return AttentionMap(trace, layer, head, query)
