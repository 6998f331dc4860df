"""What the forward pass is given and where it writes, and the keys that a tile of queries sees.

Triton reads TRITON_INTERPRET when a kernel is decorated, so this file is imported late.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lens_kernels.triton_logits import FAR


class RowOutputs(NamedTuple):
    """Where results go: [batch, heads, queries], contiguous; None is not computed."""

    lse: Any  # always
    max_logit: Any
    entropy: Any
    concentration: Any
    distance: Any
    value_norm: Any
    prefix_mass: Any  # of the first `RowInputs.prefix` keys, in a loop of its own
    means: Any  # [features, batch, heads, queries]
    match_mass: Any  # [pairs, batch, heads, queries]


class RowInputs(NamedTuple):
    """What rows are summed against."""

    features: Any  # [features, batch, kv_heads, keys] float32
    query_labels: Any  # [pairs, batch, queries] int32, never -2
    key_labels: Any  # [pairs, batch, keys] int32, never -1 where a row label is -1
    prefix: Any


class FirstKey(NamedTuple):
    """One key of each batch row that is a group of its own, and where the others' state goes.

    Shapes as in `RowOutputs`; the statistics are None where that one is, everything where no key is
    apart (a tuple with None in it cannot be told from None while compiling).
    """

    key: Any  # [batch] int32
    logit: Any  # of that key; -inf where it is hidden
    lse: Any
    max_logit: Any
    entropy: Any
    concentration: Any
    distance: Any


class BlockList(NamedTuple):
    """The key blocks that each query block visits, ascending; broadcast axes have stride 0."""

    blocks: Any  # [batch, heads, query_blocks, key_blocks] int32, the kept ones first
    count: Any  # [batch, heads, query_blocks] int32
    batch: Any  # strides of blocks, in rows of key_blocks
    head: Any
    width: Any  # key_blocks


@triton.jit
def key_span(low, high, mask, first_row, last_row, shape):
    """Keys that any row of a tile sees: first, one past the last; and one past those all rows see.

    The last of the three is meant for masks without a window, whose ranges start at key 0.
    """
    if mask.low is None:
        first = first_row + mask.offset
        last = last_row + mask.offset
        begin = 0
        end = shape.keys
        shared_end = shape.keys
        if mask.window is not None:
            begin = tl.maximum(first - mask.window + 1, 0)
            end = tl.minimum(end, tl.maximum(last + mask.window, 0))
        if mask.causal:
            end = tl.minimum(end, tl.maximum(last + 1, 0))
            shared_end = tl.minimum(shared_end, tl.maximum(first + 1, 0))
    else:
        begin = tl.min(tl.where(high > low, low, FAR), 0)
        end = tl.max(high, 0)
        shared_end = tl.min(high, 0)
    return tl.minimum(begin, end), end, shared_end
