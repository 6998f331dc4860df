"""One or few queries against a long key cache: pieces of the keys side by side, merged exactly.

A few queries leave most of a machine idle when each head is one unit of work. Here the keys are cut
into pieces that run side by side (splits.py); `attention` does so by itself for one query on a GPU.

For a cache that is not one tensor (pages, other devices), run `attention` on each part with the
mask that belongs to it and `merge` the states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from torch import Tensor

from lens_kernels.api import AttentionOptions, finish
from lens_kernels.arguments import without_autocast
from lens_kernels.dispatch import choose, load
from lens_kernels.nonfinite import guarded
from lens_kernels.splits import PIECE, run_split
from lens_kernels.types import AttentionResult
from lens_kernels.validation import make_problem

if TYPE_CHECKING:
    from jaxtyping import Float

FEW = 64
"""Queries that `decode` takes at most; with more, rows fill a machine by themselves."""


@without_autocast
def decode(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    piece: int = PIECE,
    backend: str = "auto",
    **options: Unpack[AttentionOptions],
) -> AttentionResult:
    """What `attention` returns, computed over pieces of the keys; for few queries and many keys.

    Args:
        query, key, value, backend, options: as for `attention`.
        piece: keys per piece, a multiple of the key block.

    Raises:
        TypeError, ValueError: as `attention`; more than 64 queries; a piece that does not fit.

    Example:
        >>> import torch
        >>> query, key = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 300, 16)
        >>> decode(query, key, key, piece=128).statistics.lse.exp().round().flatten().tolist()
        [300.0, 300.0]
    """
    problem = make_problem(query, key, value, **options)
    if problem.queries > FEW:
        raise ValueError(f"decode takes up to {FEW} queries, got {problem.queries}; call attention")
    if not isinstance(piece, int) or piece < 1 or piece % problem.block_size[1]:
        raise ValueError(
            f"piece must be a multiple of the key block {problem.block_size[1]}, got {piece!r}"
        )
    chosen = choose(problem, backend)
    run = load(chosen).run
    return finish(problem, guarded(problem, lambda part: run_split(part, run, piece)), chosen)
