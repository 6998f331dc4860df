"""One call of an attention layer: what the model handed to it, and its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lens_kernels import AttentionResult, attention
from torch import Tensor
from torch.nn.functional import pad

from lens.common.errors import LensError
from lens.passes.structures import MaskStructure

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class Places:
    """What the positions of one axis are, where a layer says it.

    Attributes:
        names: of every position.
        patches: of a picture, as in docs/schema/trace.md.
        cells: (row, column) of every position, those of padding included; None where they are no cells of one grid.
    """

    names: tuple[str, ...]
    patches: Mapping[str, Any]
    cells: tuple[tuple[int, int], ...] | None = None

    @property
    def real(self) -> int:
        """How many there are before those of the padding of windows, which stand last."""
        if self.cells is None:
            return len(self.names)
        return int(self.patches["height"] * self.patches["width"])


@dataclass(frozen=True)
class LayerCall:
    """One call of an attention layer: what the model handed to it.

    Attributes:
        query: [batch, heads, queries, head_dim], after rotary position embedding.
        key, value: [batch, kv_heads, keys, head_dim].
        mask: which keys each query sees.
        scale, softcap: of the logits.
        sink_logits: [heads], learned sinks, or None. Where a model has one of each query (Inkling 2), logits are those
            above it, and these are 0.
        position_bias: added to the logits, broadcastable to [batch, heads, queries, keys], or None.
        tokens: [batch, keys], token ids of the keys, or None where they are not known.
        before: [batch], token id before the first key where a cache has dropped it; -1: there is none.
        layer: the model's own number of it, from 0.
        part: which of a layer's calls in this pass; above 0 where it attends twice.
        place: of an encoder-decoder "encoder", "decoder" or "cross", of a model in stages "stage0" and so on, of a
            TimeSformer "time" or "space"; "" of any other model.
        step: forward pass of the session, from 0; generation has one for the prompt and one per token.
        seen: tokens that a cache held before this pass.
        halves: rows that read the second half of each value, others the first (Longformer's global tokens, whose
            projections are others); queries, of which half is 0, keys and values are twice as wide then. None: no halves.
        query_places, key_places: what its positions are, where the layer itself says it (patches of a stage).
        extra: names of the last keys, which are no positions of the prompt (LongT5's blocks, PegasusX's global tokens);
            of as many queries as keys the last queries are the same.
    """

    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch kv_heads keys head_dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    mask: MaskStructure
    scale: float
    softcap: float | None = None
    sink_logits: Float[Tensor, "heads"] | None = None
    position_bias: Float[Tensor, "..."] | None = None
    tokens: Int[Tensor, "batch keys"] | None = None
    before: Int[Tensor, "batch"] | None = None
    layer: int = 0
    part: int = 0
    place: str = ""
    step: int = 0
    seen: int = 0
    query_places: Places | None = None
    key_places: Places | None = None
    halves: Bool[Tensor, "batch queries"] | None = None
    extra: tuple[str, ...] = ()

    @property
    def cross(self) -> bool:
        """Whether the keys are of another sequence (cross-attention)."""
        return self.mask.cross


def first_of(output: Any) -> Tensor:
    """What a module gives, or the first of several things that it does."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, first: Tensor) -> Any:
    """What a module gives, with another tensor in the place of the first."""
    return first if isinstance(output, Tensor) else (first, *output[1:])


def read_half(call: LayerCall, output: Tensor) -> Tensor:
    """[batch, heads, queries, value_dim] of what each row reads."""
    if call.halves is None:
        return output
    first, second = output.chunk(2, -1)
    return second.where(call.halves[:, None, :, None], first)


def of_heads(
    call: LayerCall, shared: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch heads keys dim"]:
    """What groups of heads share, such as keys, for each of them."""
    return shared.repeat_interleave(call.query.shape[1] // shared.shape[1], 1)


def cut(
    tensor: Tensor | None,
    *,
    rows: Any = None,
    heads: Any = None,
    queries: Any = None,
    keys: Any = None,
) -> Any:
    """Some rows, heads, queries and keys of what broadcasts to [batch, heads, queries, keys]; an axis of 1 stays."""
    for axis, part in ((-4, rows), (-3, heads), (-2, queries), (-1, keys)):
        if tensor is None or part is None or tensor.dim() < -axis or tensor.shape[axis] == 1:
            continue
        tensor = tensor[(..., part, *[slice(None)] * (-axis - 1))]
    return tensor


def evened(call: LayerCall) -> LayerCall:
    """The call whose rows look at all keys that they see alike: logits of 0. Its learned sinks are left."""
    return replace(call, query=torch.zeros_like(call.query), position_bias=None)


def without_last(call: LayerCall, count: int) -> LayerCall:
    """The call without its last queries and their keys."""
    kept = slice(-count)
    return replace(
        call,
        query=call.query[:, :, kept],
        key=call.key[:, :, kept],
        value=call.value[:, :, kept],
        mask=call.mask.without_last(count),
        position_bias=cut(call.position_bias, queries=kept, keys=kept),
        tokens=None if call.tokens is None else call.tokens[:, kept],
    )


def with_dropped(call: LayerCall, count: int) -> LayerCall:
    """The call with `count` more keys before its own, in the place of those that a window's cache has dropped.

    They are zeros, and every query is too far from them to see them.
    """
    bias, mask, more = call.position_bias, call.mask, (count, 0)
    if bias is not None and bias.shape[-1] > 1:
        bias = pad(bias, more)
    return replace(
        call,
        key=pad(call.key, (0, 0, *more)),
        value=pad(call.value, (0, 0, *more)),
        mask=replace(
            mask,
            start=mask.start - count,
            allowed=None if mask.allowed is None else pad(mask.allowed, more),
            padding=None if mask.padding is None else pad(mask.padding, more),
        ),
        position_bias=bias,
        tokens=None if call.tokens is None else pad(call.tokens, more, value=-1),
    )


def of_rows(call: LayerCall, rows: Bool[Tensor, "batch"], first: int) -> LayerCall:
    """Some rows of a call, from the key `first` on, and without the queries before it."""
    skip = max(0, first - (call.key.shape[2] - call.query.shape[2]))
    queries, keys, mask = slice(skip, None), slice(first, None), call.mask
    padding = None if mask.padding is None else mask.padding[rows, first:]
    return replace(
        call,
        query=call.query[rows][:, :, queries],
        key=call.key[rows][:, :, keys],
        value=call.value[rows][:, :, keys],
        mask=replace(
            mask,
            padding=None if padding is None or bool(padding.all()) else padding,
            allowed=cut(mask.allowed, rows=rows, queries=queries, keys=keys),
            start=mask.start + first,
            first=None if mask.first is None else mask.first[rows],
        ),
        position_bias=cut(call.position_bias, rows=rows, queries=queries, keys=keys),
        tokens=None if call.tokens is None else call.tokens[rows, first:],
        before=None if call.before is None else call.before[rows],
    )


def kernel_options(call: LayerCall) -> dict[str, Any]:
    """Mask, scale, softcap and learned sinks of a call, as `lens_kernels` takes them."""
    mask = call.mask.for_kernel(call.query.shape[2])
    if call.position_bias is not None:
        mask = replace(mask, bias=call.position_bias)
    return {
        "mask": mask,
        "scale": call.scale,
        "softcap": call.softcap,
        "sink_logits": call.sink_logits,
    }


def attend(call: LayerCall, **asked: Any) -> AttentionResult:
    """The attention of a call; `asked` is what `lens_kernels.attention` takes beside or instead.

    Raises:
        LensError: a backend that does not exist, or cannot do it.
    """
    try:
        return attention(call.query, call.key, call.value, **{**kernel_options(call), **asked})
    except (TypeError, ValueError) as error:  # a backend that does not exist, or cannot do it
        raise LensError(str(error)) from error
