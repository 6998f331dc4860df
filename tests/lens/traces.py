"""Traces made from whole probability matrices, for the tests of everything that reads traces."""

import numpy as np

from lens.models.info import ModelInfo
from lens.traces.trace import AttentionTrace, TraceWriter
from tests.lens.naive import statistics

LENGTH = 67
BLOCK = 16
ATTRIBUTES = {
    "model": "analytic",
    "block_size": BLOCK,
    "causal": True,
    "softcap": None,
    "dtype": "float32",
    "backend": "reference",
    "bos": "absent",
    "prefix": 4,
}


def sizes(layers: int, heads: int) -> ModelInfo:
    """What is known of a model that is only its sizes."""
    return ModelInfo(layers, heads, heads, 8, None, None, 0, "none", "Made", tuple(range(layers)))


def probabilities(layers: int, heads: int, length: int, seed: int, causal: bool = True):
    """[layers, heads, length, length] softmax of random logits."""
    logits = np.random.default_rng(seed).normal(0, 2, (layers, heads, length, length))
    if causal:
        logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def token_ids(length: int) -> list[int]:
    """Ids of which each but the first four has an earlier copy."""
    return [i % 5 for i in range(length)]


def layer_variables(p, ids=None, causal: bool = True) -> dict[str, np.ndarray]:
    """The variables of one layer, [heads, queries, keys] -> name -> float32 array."""
    ids = token_ids(p.shape[-1]) if ids is None else ids
    found = statistics(p, ids, BLOCK, causal)
    found["lse"] = np.log(p.max(-1) + 1)
    return {name: array.astype(np.float32) for name, array in found.items()}


def trace_of(
    p, ids=None, causal: bool = True, without=(), visible=None, **attributes
) -> AttentionTrace:
    """A trace in memory with the statistics of [layers, heads, length, length] probabilities.

    `visible` is stored where it is given; else it follows from the windows.
    """
    length = p.shape[-1]
    ids = token_ids(length) if ids is None else ids
    writer = TraceWriter()
    for layer, matrix in enumerate(p):
        variables = layer_variables(matrix, ids, causal)
        if visible is not None:
            variables["visible"] = visible
        writer.add_layer(layer, {k: v for k, v in variables.items() if k not in without})
    return writer.finish(
        token_ids=ids,
        tokens=[f"t{i}" for i in ids],
        attributes={
            **ATTRIBUTES,
            "causal": causal,
            "windows": [None] * len(p),
            "scale": [1.0] * len(p),
            **attributes,
        },
    )
