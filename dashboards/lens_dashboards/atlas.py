"""The numbers behind the atlas: a small picture of every head, all of one size."""

import numpy as np

from lens.traces.trace import AttentionTrace
from lens_dashboards.raster import Pooling, blank, pool, raster

CELLS = 32
"""Cells a side of a head's picture, at most: 1,024 heads are 4 MiB."""


def atlas(trace: AttentionTrace, variant: str = "raw", pooling: Pooling = "max") -> np.ndarray:
    """[layers, heads, rows, columns] float32; NaN where no query may see the key.

    Block mass as captured, several blocks pooled into a cell where there are more than `CELLS`. A prompt
    of fewer than four blocks is drawn from exact probabilities where q and k were kept. One layer is
    read at a time. Only these short prompts can leave the first key out, see `no_form`.
    """
    size = trace.attrs["block_size"]
    blocks = max(len(trace.dataset[name]) for name in ("query_block", "key_block"))
    if _is_short(trace):
        return _from_tokens(trace, variant, pooling)
    step = -(-blocks // CELLS)
    layers = []
    for layer in trace.layers:
        values = trace.dataset["block_mass"].sel(layer=layer).values.astype(np.float32)
        heads = [pool(head, step, pooling) if step > 1 else head for head in values]
        layers.append([blank(head, trace, 0, 0, size * step) for head in heads])
    return np.array(layers, dtype=np.float32)


def no_form(trace: AttentionTrace) -> str:
    """Why the atlas of a trace has no sink-excluded form; empty if it has."""
    if _is_short(trace):
        return ""
    return (
        "These pictures are of blocks of tokens, which have no sink-excluded form: the first token is "
        "counted here. Open a head and zoom in to see single tokens without it."
    )


def _is_short(trace: AttentionTrace) -> bool:
    blocks = max(len(trace.dataset[name]) for name in ("query_block", "key_block"))
    return blocks < 4 and not any(
        trace.tile_refusal(layer, head) for layer in trace.layers for head in range(trace.heads)
    )


def _from_tokens(trace: AttentionTrace, variant: str, pooling: Pooling) -> np.ndarray:
    step = -(-max(trace.length, trace.queries) // CELLS)
    return np.array(
        [
            [
                blank(
                    pool(
                        np.nan_to_num(raster(trace, layer, head, None, pooling, variant).values),
                        step,
                        pooling,
                    ),
                    trace,
                    0,
                    0,
                    step,
                )
                for head in range(trace.heads)
            ]
            for layer in trace.layers
        ],
        dtype=np.float32,
    )
