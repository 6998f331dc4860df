"""MInference's own search: of a fixed grid of patterns the one that keeps most attention, head by head."""

from __future__ import annotations

from typing import Any

from lens.models.loaded import LoadedModel
from lens.policies.a_shape import AShape
from lens.policies.base import Policy
from lens.policies.block_sparse import BlockSparse
from lens.policies.evaluating import evaluate
from lens.policies.per_head import PerHead
from lens.policies.vertical_slash import VerticalSlash

GRID: tuple[Policy, ...] = (
    AShape(100, 800),
    VerticalSlash(30, 800, last=30),
    VerticalSlash(100, 750, last=30),
    VerticalSlash(500, 700, last=30),
    VerticalSlash(3500, 100, last=30),
    BlockSparse(share=0.125),
)
"""Version 1 of the released search; its block-sparse pattern has blocks of 32."""
FIRST_ROW = 2500
"""The released search scores rows from here on: those before see less than its patterns keep."""


def minference(
    model: LoadedModel,
    prompt: Any,
    *,
    candidates: tuple[Policy, ...] = GRID,
    first_row: int = FIRST_ROW,
    block_size: int = 64,
    progress: bool = True,
) -> PerHead:
    """The pattern of each head that keeps most of its attention on one prompt, as MInference chooses.

    Nothing weighs what a pattern costs: the grid is meant to cost about the same everywhere. Where it
    does not, `search` is the one to ask.

    Args:
        model, progress: as of `evaluate`.
        prompt: one, longer than `first_row` tokens; published: one of 30,000.
        candidates: of equal recall the first.
        first_row: recall is the mean over rows from here on.
        block_size: of all of them, tokens.

    Raises:
        LensError: a prompt without such rows; as `evaluate`.

    Reference: Jiang et al., MInference 1.0, arXiv 2407.02490; microsoft/MInference,
        minference/modules/minference_forward.py, `search_pattern`.

    Example:
        >>> grid = (lens.policies.AShape(2, 8), lens.policies.VerticalSlash(4, 4, first=1, last=1, probe=8))
        >>> policy = lens.policies.minference(
        ...     model, texts[0], candidates=grid, first_row=12, block_size=4, progress=False
        ... )
    """
    found = evaluate(
        model,
        [prompt],
        candidates,
        block_size=block_size,
        first_row=first_row,
        progress=progress,
    )
    recall = found.of("recall")[..., 0]  # [candidates, layers, heads]
    best = recall.argmax(0).ravel()
    return PerHead(dict(zip(found.heads, (candidates[at] for at in best), strict=True)))
