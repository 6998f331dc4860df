"""What the measures of pictures share: the exact attention of every patch, and where patches are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.head_ids import HeadId, all_heads, head_columns
from lens.traces.pictures import PatchGrid, grid_numbered
from lens.traces.tiles import mask_number, sees

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

MOST_PATCHES = 4096
"""Patches of a picture of which a whole map of a head is looked at."""
SMALLEST = 1e-6
"""Mass on patches, below which a row says nothing of shares and distances."""


def grid_of(trace: AttentionTrace, image: int = 0) -> PatchGrid:
    """The patches of one picture of a trace.

    Raises:
        LensError: no trace, no picture, patches that are not known, or too many of them.
    """
    grid = grid_numbered(given_as("AttentionTrace", trace=trace), image)
    if grid.height * grid.width > MOST_PATCHES:
        raise LensError(
            f"{grid.height} × {grid.width} patches are more than {MOST_PATCHES:,}, of which whole maps are looked at; "
            "make the picture smaller, or take one tile (image=)"
        )
    return grid


def offsets(grid: PatchGrid) -> np.ndarray:
    """int [2, patches, patches]: rows and columns from each patch (by position) to each other."""
    places = np.stack(np.divmod(grid.order, grid.width))
    return places[:, None, :] - places[:, :, None]


def maps(trace: AttentionTrace, grid: PatchGrid) -> Iterator[tuple[HeadId, np.ndarray]]:
    """Every head with its exact attention [patches, patches], which sums to less than 1 where there is more to see.

    Raises:
        LensError: the trace has no exact tiles.
    """
    for head in trace.every_head:
        yield head, trace.tile(*head, grid.span, grid.span)


def uniform_maps(
    trace: AttentionTrace, span: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Every layer with uniform attention [span, span] over what each position sees there, as `maps` has a head; and whether
    that is another than the layer before had (windows that are shifted)."""
    known, found = None, np.empty(0)
    for layer in trace.layers:
        own = mask_number(trace.dataset, layer)
        if own != known:
            seen = sees(trace.dataset, layer, span)
            found = seen[:, slice(*span)] / np.maximum(seen.sum(-1, keepdims=True), 1)
        yield layer, found, own != known
        known = own


def of_uniform(
    trace: AttentionTrace, span: tuple[int, int], measure: Callable[[np.ndarray], Any]
) -> np.ndarray:
    """[layers, ...] what a measure of a map is of uniform attention over what each position sees."""
    found: list[Any] = []
    for _, one, is_new in uniform_maps(trace, span):
        found.append(measure(one) if is_new else found[-1])
    return np.array(found)


def in_words(values: np.ndarray, form: str) -> str:
    """A number a layer, as one where they are alike and else from the lowest to the highest."""
    low, high = (format(end, form) for end in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def over_heads(trace: AttentionTrace, values: list[np.ndarray]) -> np.ndarray:
    """[layers, heads, ...] of one array per head, in the order of `maps`."""
    found = np.array(values)
    return found.reshape(len(trace.layers), trace.heads, *found.shape[1:])


def head_table(layers: Sequence[int], columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """`layer`, `head`, `name` and these columns, each of an array [layers, heads, ...] of one shape: one row per entry."""
    _, heads, *rest = next(iter(columns.values())).shape
    places = all_heads(layers, heads)
    found = pd.DataFrame(head_columns([one for one in places for _ in range(math.prod(rest))]))
    return found[["layer", "head", "name"]].assign(
        **{name: values.ravel() for name, values in columns.items()}
    )
