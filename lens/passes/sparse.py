"""Banded and block-sparse attention that a model computes in pieces, said as a mask of the one attention.

Longformer and LED (arXiv 2004.05150): a band, and global tokens that all see and that see all, with projections of their
own. BigBird (2007.14062): blocks. LongT5 (2112.07916): a band with T5's position bias, and with transient-global attention
a key for each block behind it. PegasusX (2208.04347): blocks, staggered in every other layer, and global tokens, which
stand behind the others. Each is a softmax under a mask, so that a forward pass without the pieces gives the same numbers;
`lens.load` proves it. So are Canine's chunks of characters (2103.06874); Hiera's mask units stay rows, for `lens.passes.windows`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lens.common.errors import LensError
from lens.passes.masks import HIDDEN, refuse_large

Attend = Callable[..., Tensor]
"""As `lens.passes.interface.own_attention`."""


def form_of(module: nn.Module) -> Callable[..., Any] | None:
    """What stands for the forward pass of a module: (module, attend, *its arguments); None: it is not of these."""
    return _FORMS.get(type(module).__name__) if getattr(module, "local", True) else None


def shortest(config: Any) -> int:
    """Tokens that a prompt must have at least for the attention to be sparse; 0: any.

    BigBird turns itself, for good, into full attention when it reads a shorter one.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return 0
    return (5 + 2 * config.num_random_blocks) * config.block_size + 1


def _longformer(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    attention_mask: Tensor,
    is_index_masked: Tensor,
    is_index_global_attn: Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """As `LongformerSelfAttention.forward`."""
    whole = hidden_states.shape[1]
    hidden_states = _cropped(hidden_states, ~is_index_masked)
    length = hidden_states.shape[1]
    real = ~is_index_masked[:, :length]
    window, scale = module.one_sided_attn_window_size + 1, module.head_dim**-0.5
    own = _heads(hidden_states, module.num_heads, module.query, module.key, module.value)
    if not is_global_attn:
        mask = None
        if not bool(real.all()):
            mask = _band(length, window, real.device) & real[:, None, None]
        output = attend(module, *own, mask, scale, None, window=window if mask is None else None)
        return _padded(output.flatten(2), whole, output_attentions)
    assert is_index_global_attn is not None
    seen_by_all = is_index_global_attn[:, :length]
    refuse_large(length, length, "global tokens")
    parts = (module.query_global, module.key_global, module.value_global)
    of_global = _heads(hidden_states, module.num_heads, *parts)
    query, key, value = (torch.cat(pair, -1) for pair in zip(own, of_global, strict=True))
    half = torch.arange(query.shape[-1], device=query.device) >= module.head_dim
    query = query.masked_fill(seen_by_all[:, None, :, None] != half, 0)
    band = _band(length, window, real.device) | seen_by_all[:, None, None]
    allowed = (band | seen_by_all[:, None, :, None]) & real[:, None, None]
    output = attend(module, query, key, value, allowed, scale, None, halves=seen_by_all)
    return (*_padded(output.flatten(2), whole, output_attentions), *[None] * output_attentions)


def _bigbird(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    band_mask: Tensor | None = None,
    from_mask: Tensor | None = None,
    to_mask: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> tuple[Any, ...]:
    """As `BigBirdBlockSparseAttention.forward`, in eval mode, where its random blocks all are the first block."""
    if module.training:
        raise LensError(
            "the random blocks of BigBird are drawn in training mode; call model.eval() first"
        )
    assert to_mask is not None
    whole = hidden_states.shape[1]
    real = to_mask[:, 0, 0] > 0
    hidden_states = _cropped(hidden_states, real)
    length = hidden_states.shape[1]
    real = real[:, :length]
    refuse_large(length, length, "blocks")
    parts = (module.query, module.key, module.value)
    own = _heads(hidden_states, module.num_attention_heads, *parts)
    last = whole // module.block_size - 1
    block = torch.arange(length, device=real.device) // module.block_size
    row, column = block[:, None], block
    ends = (row == 0) | (row == last) | (column == 0) | (column == last)
    allowed = (ends | ((row - column).abs() <= 1)) & real[:, None, None]
    # keys of the first block are counted once more for each random block
    again = ((column == 0) & (row > 0) & (row < last)).to(hidden_states.dtype)
    bias = (again * math.log(1 + module.num_random_blocks))[None, None]
    output = attend(module, *own, allowed, module.attention_head_size**-0.5, bias)
    output = output.flatten(2).masked_fill(~real[..., None], 0)
    return (*_padded(output, whole, False), None)


def _local(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Any = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """As `LongT5LocalAttention.forward`; the bias that it hands on is that of all positions, with the mask."""
    query, key, value = _heads(hidden_states, module.n_heads, module.q, module.k, module.v)
    if position_bias is None:
        seen = None
        if mask is not None:
            # [batch, 1, blocks, rows, keys of three blocks]: a row that sees itself is real
            own = mask[..., module.block_len : 2 * module.block_len].diagonal(dim1=-2, dim2=-1)
            seen = own.flatten(2)[:, 0, : hidden_states.shape[1]].bool()
        position_bias = _band_of_t5(module, hidden_states, seen)
    output = attend(module, query, key, value, position_bias, 1.0, None)
    output = module.o(output.flatten(2))
    return (output, position_bias, *[None] * output_attentions)


def _transient(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    position_bias: Any = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """As `LongT5TransientGlobalAttention.forward`: the sums of blocks are keys too."""
    made: Any = sys.modules[type(module).__module__]
    mask = hidden_states.new_ones(hidden_states.shape[:2]) if mask is None else mask
    blocks, segments = made._make_global_fixed_block_ids(mask, module.global_block_size)
    count = segments.shape[-1]
    sums = made._create_global_aggregates(hidden_states, blocks, count)
    sums = module.global_input_layer_norm(sums)
    query, key, value = _heads(hidden_states, module.n_heads, module.q, module.k, module.v)
    of_blocks = _heads(sums, module.n_heads, module.k, module.v)
    key, value = (torch.cat(pair, 2) for pair in zip((key, value), of_blocks, strict=True))
    if position_bias is None:
        beside = module.compute_side_bias(mask, segments)
        own = _band_of_t5(module, hidden_states, mask.bool())
        own = own.expand(len(beside), -1, -1, -1)
        position_bias = torch.cat([own, beside.to(own)], -1)
    extra = tuple(f"[block {number}]" for number in range(count))
    output = attend(module, query, key, value, position_bias, 1.0, None, extra=extra)
    output = module.o(output.flatten(2))
    return (output, position_bias, *[None] * output_attentions)


def _band_of_t5(module: Any, hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """T5's position bias of all positions, [batch | 1, heads, length, length], very low outside of LongT5's band."""
    length = hidden_states.shape[1]
    refuse_large(length, length, "a position bias")
    place = torch.arange(length, device=hidden_states.device)
    bias = hidden_states.new_zeros(1, module.n_heads, length, length)
    if module.has_relative_attention_bias:
        buckets = module._relative_position_bucket(
            place - place[:, None],
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        bias = module.relative_attention_bias(buckets).permute(2, 0, 1)[None]
    seen = _band(length, module.block_len, place.device)
    if real is not None:
        seen = seen & real[:, None, None]
    return bias.masked_fill(~seen, -1e10)


def _global_local(
    module: Any,
    attend: Attend,
    token_hidden_states: Tensor,
    global_hidden_states: Tensor,
    attention_mask: Tensor,
    **_: Any,
) -> tuple[Any, ...]:
    """As `PegasusXGlobalLocalAttention.forward`: tokens see those of their block and the global ones, these see all."""
    whole, count = token_hidden_states.shape[1], global_hidden_states.shape[1]
    real = attention_mask > HIDDEN
    places = real.any(0).nonzero()
    first, past = int(places.min()), int(places.max()) + 1
    length = past - first
    refuse_large(length + count, length + count, "blocks")
    states = torch.cat([token_hidden_states[:, first:past], global_hidden_states], 1)
    parts = (module.q_proj, module.k_proj, module.v_proj)
    own = _heads(states, module.num_heads, *parts)
    block = torch.arange(first, past, device=real.device) // module.block_size
    allowed = nn.functional.pad(block[:, None] == block, (0, count, 0, count), value=True)
    allowed = allowed & nn.functional.pad(real[:, first:past], (0, count), value=True)[:, None]
    extra = tuple(f"[global {number}]" for number in range(count))
    scale = module.head_dim**-0.5
    output = module.out_proj(
        attend(module, *own, allowed[:, None], scale, None, extra=extra).flatten(2)
    )
    tokens = nn.functional.pad(output[:, :length], (0, 0, first, whole - past))
    return tokens, output[:, length:], None


def _chunks(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """As `CanineAttention.forward` of characters, in chunks side by side."""
    length, inner = hidden_states.shape[1], module.self
    refuse_large(length, length, "chunks")
    parts = (inner.query, inner.key, inner.value)
    own = _heads(hidden_states, inner.num_attention_heads, *parts)
    chunk = torch.arange(length, device=hidden_states.device) // module.attend_from_chunk_stride
    allowed = (chunk[:, None] == chunk) & attention_mask.bool()
    output = attend(module, *own, allowed[:, None], inner.attention_head_size**-0.5, None)
    output = module.output(output.flatten(2), hidden_states)
    return (output, *[None] * output_attentions)


def _mask_units(
    module: Any, attend: Attend, hidden_states: Tensor, output_attentions: bool = False
) -> tuple[Tensor, None]:
    """As `HieraMaskUnitAttention.forward`, a row for each unit."""
    batch, length = hidden_states.shape[:2]
    stride = module.query_stride
    inside = stride * module.window_size if module.use_mask_unit_attn else length
    parts = module.qkv(hidden_states).view(batch, inside, -1, 3, module.num_heads, module.head_dim)
    query, key, value = parts.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [units, heads, inside, d]
    if stride > 1:
        query = query.unflatten(2, (stride, -1)).amax(2)
    output = attend(module, query, key, value, None, module.scale, None)
    output = (
        output.unflatten(0, (batch, -1))
        .transpose(1, 2)
        .reshape(batch, -1, module.hidden_size_output)
    )
    return module.proj(output), None


_FORMS: dict[str, Callable[..., Any]] = {
    "LongformerSelfAttention": _longformer,
    "LEDEncoderSelfAttention": _longformer,
    "BigBirdBlockSparseAttention": _bigbird,
    "BigBirdPegasusBlockSparseAttention": _bigbird,
    "CanineAttention": _chunks,
    "HieraMaskUnitAttention": _mask_units,
    "LongT5LocalAttention": _local,
    "LongT5TransientGlobalAttention": _transient,
    "PegasusXGlobalLocalAttention": _global_local,
}


def _heads(states: Tensor, heads: int, *projections: nn.Module) -> list[Tensor]:
    """What each projection makes of [batch, positions, width], as [batch, heads, positions, head_dim]."""
    return [one(states).unflatten(-1, (heads, -1)).transpose(1, 2) for one in projections]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [1, 1, length, length]: keys at a distance below the window."""
    refuse_large(length, length, "a band and padding")
    place = torch.arange(length, device=device)
    return ((place[:, None] - place).abs() < window)[None, None]


def _cropped(states: Tensor, real: Tensor) -> Tensor:
    """Without the positions at the end that are padding in every row: models add them to fill their last block."""
    last = int(real.any(0).nonzero().max()) + 1
    return states[:, :last]


def _padded(output: Tensor, whole: int, output_attentions: bool) -> tuple[Any, ...]:
    """With zeros where padding was left out, which nothing reads; and no probabilities, which nobody asked for."""
    output = nn.functional.pad(output, (0, 0, 0, whole - output.shape[1]))
    return (output, *[None] * output_attentions)
