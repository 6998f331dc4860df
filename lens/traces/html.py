"""The picture of a trace in a notebook: a static page of thumbnails, no script, no network."""

from __future__ import annotations

import html

import numpy as np
import xarray as xr

from lens.common.colors import VIRIDIS, rgb
from lens.common.head_ids import layers_in_words
from lens.common.png import as_uri

_MOST_HEADS = 144
_CELL = 24


def trace_html(text: str, dataset: xr.Dataset) -> str:
    """HTML of a trace's size, as its `text` says it, provenance and one thumbnail per head (at most 144)."""
    summary = html.escape(text.split("\n")[0].strip("<>"))
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(str(name))}</th>"
        f"<td>{html.escape(str(value))}</td></tr>"
        for name, value in dataset.attrs.items()
        if not isinstance(value, dict | list)
    )
    pictures = _thumbnails(dataset) if "block_mass" in dataset else ""
    return (
        f"<div><p><b>{summary}</b></p>{pictures}"
        f"<details><summary>Provenance</summary><table>{rows}</table></details></div>"
    )


def _thumbnails(dataset: xr.Dataset) -> str:
    total = dataset.sizes["layer"]
    layers = max(1, min(total, _MOST_HEADS // dataset.sizes["head"]))
    picture = atlas(dataset, range(layers))
    address = as_uri(picture)
    shown = layers_in_words(dataset["layer"].values[:layers].tolist())
    more = f" ({shown}{'' if layers == total else f' of {total}'})"
    return (
        f"<p>Block mass, layers down, heads across{more}; each map on its own log scale.</p>"
        f"<img alt='Block mass of each head' style='image-rendering:pixelated' "
        f"src='{address}'>"
    )


def atlas(dataset: xr.Dataset, layers: range) -> np.ndarray:
    """[height, width, 3] uint8 picture of the block maps, max-pooled to 24 cells a side."""
    step = _CELL + 2
    picture = np.full((step * len(layers), step * dataset.sizes["head"], 3), 255, np.uint8)
    palette = np.array(rgb(VIRIDIS), np.uint8)
    (rows, down), (columns, across) = (
        _pooling(dataset.sizes[f"{n}_block"]) for n in ("query", "key")
    )
    for row, layer in enumerate(layers):
        for head in range(dataset.sizes["head"]):
            values = dataset["block_mass"].isel(layer=layer, head=head).values
            pooled = np.maximum.reduceat(np.maximum.reduceat(values, rows, 0), columns, 1)
            scaled = np.clip(
                1 + np.log10(np.maximum(pooled, 1e-9) / max(pooled.max(), 1e-9)) / 3, 0, 1
            )
            colors = palette[(scaled * (len(palette) - 1)).astype(int)]
            if dataset.attrs["causal"]:
                colors = np.where(np.tri(len(rows), dtype=bool)[..., None], colors, 255)
            picture[row * step :, head * step :][:_CELL, :_CELL] = colors[down][:, across]
    return picture


def _pooling(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """First block of each cell, and the cell of each pixel."""
    cells = min(_CELL, blocks)
    return np.linspace(0, blocks, cells + 1).astype(int)[:-1], np.arange(_CELL) * cells // _CELL
