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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lens.common.colors import VIRIDIS
from lens.common.errors import LensError
from lens.traces.trace import AttentionTrace
from lens_dashboards.raster import MOST_CELLS, Raster, pool, raster, row

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ASSETS = Path(__file__).parent / "assets"
_INLINE_CELLS = 160  # a side, of the map that a notebook keeps: about 130 kB
_HEIGHT = 860  # pixels of it
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
<section class="card"><div id="map" class="map"></div></section>
<section class="card"><h2>Tokens</h2><div id="strip" class="strip"></div></section>
</main>
<script type="application/json" id="held">{held}</script>
<script>{script}</script>
<script>
const held = JSON.parse(document.getElementById("held").textContent);
window.lensBlockMap.make(document.getElementById("map"), {{ ...held.config, held: true, source: window.lensBlockMap.heldSource(held) }});
</script>
</body>
</html>
"""


@dataclass(frozen=True, repr=False, eq=False)
class AttentionMap:
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

    def to_html(self, path: str | Path | None = None, *, cells: int = MOST_CELLS) -> str:
        """A page that needs nothing but itself; written to `path` if given.

        Args:
            path: of the file.
            cells: most cells a side; what is finer is pooled (the largest), and the page says so.

        Raises:
            LensError: fewer than 8 cells.
        """
        page = _PAGE.format(
            title=html.escape(self._title),
            caption=html.escape(self._caption(self._raster(cells))),
            style=(_ASSETS / "style.css").read_text(encoding="utf-8"),
            script=(_ASSETS / "blockmap.js").read_text(encoding="utf-8"),
            held=json.dumps(self._held(cells)).replace("<", "\\u003c"),
        )
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

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
        page = html.escape(self.to_html(cells=_INLINE_CELLS), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="{html.escape(self._title, quote=True)}" '
            f'style="width:100%;height:{_HEIGHT}px;border:0" sandbox="allow-scripts allow-downloads"></iframe>'
        )

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
            "layer": self.layer,
            "head": self.head,
            "window": None,
            "query": self.query,
            "palette": list(VIRIDIS),
            "causal": bool(self.trace.attrs["causal"]),
        }

    def _raster(self, cells: int) -> Raster:
        """All of the prompt in at most so many cells a side."""
        if cells < 8:
            raise LensError(f"a map needs at least 8 cells a side, got {cells}")
        found = raster(self.trace, self.layer, self.head)
        step = -(-max(found.values.shape) // cells)
        if step == 1:
            return found
        values = found.values
        pad = [(0, -length % step) for length in values.shape]
        known = np.nan_to_num(np.pad(values, pad, constant_values=np.nan), nan=-np.inf)
        pooled = pool(known, step, "max")
        pooled[np.isneginf(pooled)] = np.nan
        return Raster(
            pooled.astype(np.float32),
            "pooled",
            found.query_start,
            found.key_start,
            found.cell * step,
            found.query_end,
            found.key_end,
        )

    def _caption(self, found: Raster) -> str:
        what = {
            "tokens": "exact probabilities of single tokens",
            "blocks": f"mean mass of blocks of {found.cell} tokens",
            "pooled": f"the largest value of each {found.cell} × {found.cell} tokens",
        }
        return f"{self.trace.length} tokens, {what[found.level]}"

    def _held(self, cells: int) -> dict[str, Any]:
        found = self._raster(cells)
        values = np.ascontiguousarray(found.values, dtype="<f4")
        return {
            "config": self.config,
            "tokens": self.trace.tokens,
            "header": header(self.trace, found),
            "values": base64.b64encode(values.tobytes()).decode(),
        }


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
    if query is not None and not 0 <= query < trace.length:
        raise LensError(f"the prompt has tokens 0 to {trace.length - 1}; there is no query {query}")
    return AttentionMap(trace, layer, head, query)


def header(trace: AttentionTrace, found: Raster, pooling: str = "max") -> dict[str, Any]:
    """What the script must know about a rectangle beside its numbers."""
    rows, columns = found.values.shape
    return {
        "rows": rows,
        "columns": columns,
        "level": found.level,
        "cell": found.cell,
        "query": [found.query_start, found.query_end],
        "key": [found.key_start, found.key_end],
        "length": trace.length,
        "block": trace.attrs["block_size"],
        "pooling": pooling,
        "variant": found.variant,
    }


_WIDGET = """
%s
export default {
  render({ model, el }) {
    const style = document.createElement("style");
    style.textContent = model.get("style");
    const map = document.createElement("div"), strip = document.createElement("div");
    map.className = "map"; strip.className = "strip";
    el.classList.add("attention-lens");
    el.append(style, map, strip);
    const waiting = new Map();
    let last = 0;
    const ask = (kind, what) => new Promise((resolve, reject) => {
      last += 1;
      waiting.set(last, { resolve, reject });
      model.send({ id: last, kind, ...what });
    });
    const answer = (message, buffers) => {
      const asked = waiting.get(message.id);
      if (!asked) return;
      waiting.delete(message.id);
      if (message.error) asked.reject(new Error(message.error));
      else {
        const view = buffers[0].buffer ? buffers[0] : new DataView(buffers[0]);
        const bytes = view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
        asked.resolve({ ...message.header, values: new Float32Array(bytes) });
      }
    };
    model.on("msg:custom", answer);
    const drawn = window.lensBlockMap.make(map, {
      ...model.get("config"), strip,
      source: {
        tokens: async () => model.get("tokens"),
        raster: (w) => ask("raster", w),
        row: async (query) => (await ask("row", { query })).values,
      },
    });
    return () => { model.off("msg:custom", answer); drawn.close(); };
  },
};
"""


def make_widget(shown: AttentionMap) -> Any:
    """The widget of `AttentionMap.widget`.

    Raises:
        LensError: anywidget is not installed.
    """
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise LensError(
            "the widget needs anywidget: pip install 'attention-lens[notebook]'; without it the map "
            "itself, or to_html(), shows the same in less detail"
        ) from None

    class Widget(anywidget.AnyWidget):
        _esm = _WIDGET % (_ASSETS / "blockmap.js").read_text(encoding="utf-8")
        config = traitlets.Dict().tag(sync=True)
        tokens = traitlets.List().tag(sync=True)
        style = traitlets.Unicode().tag(sync=True)

    widget = Widget(
        config=shown.config,
        tokens=list(shown.trace.tokens),
        style=(_ASSETS / "style.css").read_text(encoding="utf-8"),
    )

    def answer(_: Any, message: dict[str, Any], buffers: list[Any]) -> None:
        try:
            content, values = answer_to(shown, message)
            widget.send({"id": message["id"], "header": content}, [values.tobytes()])
        except (LensError, KeyError, TypeError, ValueError) as problem:
            widget.send({"id": message.get("id"), "error": str(problem)})

    widget.on_msg(answer)
    return widget


def answer_to(shown: AttentionMap, message: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Header and numbers that the script asked for: a rectangle or a row.

    Raises:
        LensError: a rectangle, pooling or row that cannot be had.
    """
    if message["kind"] == "row":
        values = row(shown.trace, shown.layer, shown.head, int(message["query"]))
        return {"rows": 1, "columns": len(values)}, np.ascontiguousarray(values, dtype="<f4")
    pooling = message["pooling"]
    if pooling not in ("max", "mean"):
        raise LensError(f"pooling must be max or mean, got {pooling!r}")
    window = tuple(int(message[name]) for name in ("q0", "q1", "k0", "k1"))
    found = raster(shown.trace, shown.layer, shown.head, window, pooling)  # pyright: ignore[reportArgumentType]
    return header(shown.trace, found, pooling), np.ascontiguousarray(found.values, dtype="<f4")
