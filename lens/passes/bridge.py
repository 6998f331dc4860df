"""Attention of a `TransformerBridge`, which recomputes softmax in Python and asks no registry.

TransformerLens 4 wraps each attention module of the Hugging Face model in an `AttentionBridge`. Inside
the block its `forward` is replaced by one that takes the same projections (so its hooks on q, k, v and
z still fire), rotates query and key as `hook_rot_q` and `hook_rot_k` see them, and calls our attention.
Hooks on scores and pattern do not fire: those N×N tensors are never built.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lens.common.errors import LensError
from lens.passes.computed import put_over
from lens.passes.interface import lens_attention


@contextmanager
def replaced_attention(bridge: Any) -> Iterator[None]:
    """The attention modules of `bridge` call our attention inside the block.

    Raises:
        LensError: no attention module that can be replaced.
    """
    modules = [module for module in bridge.modules() if _is_a(module, "AttentionBridge")]
    if not modules:
        raise LensError(
            f"the bridge of {type(bridge.original_model).__name__} has no AttentionBridge, so its "
            "attention cannot be reached; pass the transformers model itself"
        )
    with ExitStack() as stack:
        for module in modules:
            put_over(stack, *_replacement(module))
        yield


def _replacement(module: Any) -> tuple[nn.Module, str, Callable]:
    """Whose method to replace, its name, and by what."""
    original = module.original_component
    if _is_a(module, "PositionEmbeddingsAttentionBridge"):
        return module, "forward", _through_original(module)
    if _is_a(module, "JointQKVAttentionBridge") and type(module).__name__ in _JOINT:
        return module, "_reconstruct_attention", _joint(module)
    if type(module).__name__ in _ALIBI:
        return module, "_reconstruct_attention", _joint(module, _ALIBI[type(module).__name__])
    if _is_a(original, "NativeAttention"):
        return original, "forward", _native(original)
    if type(module).__name__ == "AttentionBridge":
        return module, "forward", _through_original(module)
    raise LensError(
        f"capture does not know the bridge {type(module).__name__} over {type(original).__name__}; "
        "pass the transformers model itself"
    )


_JOINT = ("JointQKVAttentionBridge", "JointQKVPositionEmbeddingsAttentionBridge")
_ALIBI = {"BloomAttentionBridge": "alibi", "MPTALiBiAttentionBridge": "position_bias"}
"""Joint projections beside a bias by distance, and the argument that holds it: [.., 1, keys], of MPT more keys before."""


def _through_original(module: Any) -> Callable:
    """The Hugging Face module's own forward, which asks the registry and holds the bridge's q, k, v."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = module.hook_in(kwargs["hidden_states"])
        else:
            args = (module.hook_in(args[0]), *args[1:])
        output, *rest = module.original_component(*args, **kwargs)
        return (module.hook_out(output), *rest)

    return forward


def _joint(module: Any, bias: str = "") -> Callable:
    """GPT-2 and its kin: the bridge has split q, k, v out of one projection; `bias` names an argument."""

    def reconstruct(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> tuple:
        config = module.config
        if clip := getattr(module, "_clip_qkv", None):
            q, k, v = (part.clamp(-clip, clip) for part in (q, k, v))
        kv_heads = getattr(config, "n_key_value_heads", None) or config.n_heads
        q, k, v, batch, queries, head_dim = module._reshape_qkv_to_heads(
            q, k, v, config.n_heads, kv_heads
        )
        positions = kwargs.get("position_embeddings")
        if isinstance(positions, tuple) and hasattr(module, "_apply_rotary_pos_emb"):
            cos, sin = module._apply_position_embedding_hooks(positions)
            q, k = module._apply_rotary_pos_emb(q, k, cos, sin)
        k, v = module._update_kv_cache(k, v, **kwargs)
        scale = getattr(module, "_softmax_scale", None) or head_dim**-0.5
        if (
            getattr(config, "scale_attn_by_inverse_layer_idx", False)
            and module._layer_idx is not None
        ):
            scale /= module._layer_idx + 1
        added = kwargs.get(bias)
        if added is not None:
            added = added.view(-1, config.n_heads, 1, added.shape[-1])[..., -k.shape[2] :]
        mask = kwargs.get("attention_mask")
        if bias and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            mask = ~mask  # MPT's says what is hidden
        output, _ = lens_attention(
            *(module.original_component, q, k, v, mask),
            scaling=scale,
            position_bias=added,
        )
        return module._apply_output_projection(output.reshape(batch, queries, -1)), None

    return reconstruct


def _native(attention: Any) -> Callable:
    """TransformerLens' own model (`boot_native`)."""

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pattern_fn: Callable | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None:
            raise LensError("capture of a native bridge takes no attention_mask; pass one prompt")
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, attention.d_head)).transpose(1, 2)
            for project in (attention.q, attention.k, attention.v)
        )
        if attention.rotary is not None:
            query, key = attention.rotary.apply_rope(query, key, position_ids=position_ids)
        output, _ = lens_attention(
            attention,
            query,
            key,
            value,
            None,
            scaling=1 / attention.scale,
            softcap=attention.attn_scores_soft_cap if attention.attn_scores_soft_cap > 0 else None,
            is_causal=attention.causal,
        )
        return attention.o(output.flatten(-2)), None

    return forward


def _is_a(module: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)
