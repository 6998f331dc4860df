"""The map of one head as a notebook widget, which asks this process for each rectangle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.traces.pixels import Pooling
from lens.traces.trace import AttentionTrace
from lens_dashboards.raster import MOST_CELLS, header, raster, row

ASSETS = Path(__file__).parent / "assets"


class Shown(Protocol):
    """The map that a widget shows: one head of one trace."""

    @property
    def trace(self) -> AttentionTrace:
        """With the numbers."""
        ...

    @property
    def layer(self) -> int:
        """Of the head."""
        ...

    @property
    def head(self) -> int:
        """In its layer."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """What the script is told."""
        ...


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


def make_widget(shown: Shown) -> Any:
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
        _esm = _WIDGET % (ASSETS / "blockmap.js").read_text(encoding="utf-8")
        config = traitlets.Dict().tag(sync=True)
        tokens = traitlets.List().tag(sync=True)
        style = traitlets.Unicode().tag(sync=True)

    widget = Widget(
        config=shown.config,
        tokens=list(shown.trace.tokens),
        style=(ASSETS / "style.css").read_text(encoding="utf-8"),
    )

    def answer(_: Any, message: dict[str, Any], buffers: list[Any]) -> None:
        try:
            content, values = answer_to(shown, message)
            widget.send({"id": message["id"], "header": content}, [values.tobytes()])
        except (LensError, KeyError, TypeError, ValueError) as problem:
            widget.send({"id": message.get("id"), "error": str(problem)})

    widget.on_msg(answer)
    return widget


def answer_to(shown: Shown, message: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Header and numbers that the script asked for: a rectangle or a row.

    Raises:
        LensError: a rectangle, pooling or row that cannot be had.
    """
    if message["kind"] == "row":
        values = row(shown.trace, shown.layer, shown.head, int(message["query"]))
        return {"rows": 1, "columns": len(values)}, np.ascontiguousarray(values, dtype="<f4")
    pooling = check_choice("pooling", message["pooling"], Pooling)
    window: Any = tuple(int(message[name]) for name in ("q0", "q1", "k0", "k1"))
    most = min(int(message.get("cells", MOST_CELLS)), MOST_CELLS)
    found = raster(shown.trace, shown.layer, shown.head, window, pooling, most=most)
    return header(shown.trace, found, pooling), np.ascontiguousarray(found.values, dtype="<f4")
