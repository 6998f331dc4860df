"""Attention maps for the page: small pictures as PNG data URIs, each with the map that can be zoomed.

No browser and no imaging library is needed to make them.
"""

import base64
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from lens_dashboards.notebook import attention_map
from lens_dashboards.raster import pool

from lens.common.colors import VIRIDIS, rgb
from lens.common.errors import LensError
from lens.runs import Run
from lens.traces.trace import AttentionTrace

EXACT_TOKENS = 256  # also the most cells a side of the map that can be zoomed
FLOOR = 1e-3


@dataclass(frozen=True)
class HeadMap:
    """The picture of one head on one prompt.

    Attributes:
        head: `L3H5`.
        role: why it is shown, in words with its score.
        caption: prompt and resolution.
        alt: what is seen, for those who do not see it.
        image: PNG as a data URI.
        zoomable: the dashboard's map as a page of its own, which needs nothing but itself.
    """

    head: str
    role: str
    caption: str
    alt: str
    image: str
    zoomable: str


_ROLES = {
    "induction": "induction",
    "sink": "first-token sink",
    "previous_token": "previous token",
    "duplicate_token": "duplicate token",
}


def head_maps(run: Run, summary: list[dict], *, per_kind: int = 2, most: int = 8) -> list[HeadMap]:
    """Maps of the strongest heads of each finding, on the first prompt of the kind that showed it."""
    maps = []
    for finding in summary:
        if not finding["found"]:
            continue
        prompts = run.prompts[run.prompts["kind"] == finding["prompts"]]
        prompt_id = str(prompts.iloc[0]["prompt_id"])
        try:
            trace = run.trace(prompt_id)
        except LensError:
            continue
        for head in finding["heads"][:per_kind]:
            maps.append(_map(trace, prompt_id, finding, head))
    return maps[:most]


def _map(trace: AttentionTrace, prompt_id: str, finding: dict, head: dict) -> HeadMap:
    layer, index = head["layer"], head["head"]
    name = f"L{layer}H{index}"
    rows, keys = trace.queries, trace.length
    if trace.tile_refusal(layer, index):
        exact = False
    else:
        exact = rows * keys <= EXACT_TOKENS**2 if trace.cross else keys <= EXACT_TOKENS
    if exact:
        values = trace.tile(layer, index, (0, rows), (0, keys))
        step = -(-keys // EXACT_TOKENS)
        grain = "one pixel a token pair"
        if step > 1:  # a long source: as many keys a pixel, and rows as high as the picture is wide
            values, grain = pool(values, (1, step), "max"), f"{step} keys a pixel, the largest"
        values = values.repeat(max(1, values.shape[1] // (2 * rows)), 0)
    else:
        values = trace.block_mass.sel(layer=layer, head=index).values
        grain = f"blocks of {trace.attrs['block_size']} tokens"
    hidden = ~np.tri(*values.shape, dtype=bool) if trace.attrs["causal"] else None
    role = _ROLES.get(finding["kind"], finding["kind"])
    return HeadMap(
        head=name,
        role=f"{role} {head['value']:.2f}",
        caption=f"{prompt_id}, {f'{rows:,} × ' * trace.cross}{keys:,} tokens, {grain}",
        alt=f"Attention map of head {name} on prompt {prompt_id}: {role} score {head['value']:.2f}",
        image=png(colored(values, hidden)),
        zoomable=attention_map(trace, layer, index).to_html(cells=EXACT_TOKENS),
    )


def colored(values: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """[rows, columns] probabilities to [rows, columns, 4] RGBA on a log scale from `FLOOR` to 1.

    `hidden` cells, and NaN, are transparent.
    """
    stops = np.array(rgb(VIRIDIS), float)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = 1 - np.log(np.clip(values, FLOOR, 1)) / np.log(FLOOR)
    place = np.nan_to_num(level) * (len(stops) - 1)
    channels = [np.interp(place, np.arange(len(stops)), stops[:, i]) for i in range(3)]
    blank = np.isnan(values) if hidden is None else hidden | np.isnan(values)
    alpha = np.where(blank, 0, 255)
    return np.stack([*channels, alpha], axis=-1).round().astype(np.uint8)


def png(pixels: np.ndarray) -> str:
    """[rows, columns, 4] uint8 as a PNG data URI."""
    rows, columns, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    content = b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(raw, 9)),
            _chunk(b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )
