"""The numbers behind the atlas: a small picture of every head, all of one size."""

import numpy as np

from lens.trace import AttentionTrace
from lens_dashboards.raster import Pooling, blank, pool, raster

CELLS = 32
"""Cells a side of a head's picture, at most: 1,024 heads are 4 MiB."""


def atlas(trace: AttentionTrace, pooling: Pooling = "max") -> np.ndarray:
    """[layers, heads, rows, columns] float32; NaN where no query may see the key.

    Block mass as captured, several blocks pooled into a cell where there are more than `CELLS`. A prompt
    of fewer than four blocks is drawn from exact probabilities where q and k were kept. One layer is
    read at a time.
    """
    size, blocks = trace.attrs["block_size"], len(trace.dataset["query_block"])
    if blocks < 4 and not trace.tile_refusal(0, 0):
        return _from_tokens(trace, pooling)
    step = -(-blocks // CELLS)
    layers = []
    for layer in range(trace.layers):
        values = trace.dataset["block_mass"].isel(layer=layer).values.astype(np.float32)
        heads = [pool(head, step, pooling) if step > 1 else head for head in values]
        layers.append([blank(head, trace, 0, 0, size * step) for head in heads])
    return np.array(layers, dtype=np.float32)


def _from_tokens(trace: AttentionTrace, pooling: Pooling) -> np.ndarray:
    step = -(-trace.length // CELLS)
    return np.array(
        [
            [
                blank(
                    pool(np.nan_to_num(raster(trace, layer, head).values), step, pooling),
                    trace,
                    0,
                    0,
                    step,
                )
                for head in range(trace.heads)
            ]
            for layer in range(trace.layers)
        ],
        dtype=np.float32,
    )
