"""Masks as a few numbers instead of N×N: what transformers' mask functions say, kept as structure.

transformers builds one mask per layer type by composing small functions (causal, window, padding) and
asks the registered mask function to turn them into a tensor. Ours reads the composition and hands on
a 2-D padding mask that carries the structure; patterns that it does not know are spelled out as a
boolean tensor, up to `LARGEST_SPELLED_OUT` entries, never guessed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lens_kernels import AttentionMask
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from lens.common.errors import LensError

LARGEST_SPELLED_OUT = 8192 * 8192


@dataclass(frozen=True)
class MaskStructure:
    """Which keys a query sees.

    Attributes:
        causal: no key after the query; the last query stands on the last key.
        window: keys at a distance below this, or None; both ways unless causal.
        padding: bool [batch, keys], True for a real key; None when all are.
        allowed: bool [batch, 1, queries, keys], which says all of the above itself, or None.
    """

    causal: bool
    window: int | None = None
    padding: torch.Tensor | None = None
    allowed: torch.Tensor | None = None

    def for_kernel(self, queries: int) -> AttentionMask:
        """The mask as `lens_kernels` takes it; padded queries see nothing."""
        if self.padding is None or self.allowed is not None:
            return AttentionMask(causal=self.causal, window=self.window, allowed=self.allowed)
        first = self.first_key(len(self.padding))
        if queries < self.padding.shape[1]:  # cached keys: every query is a real token
            return AttentionMask(
                causal=self.causal,
                window=self.window,
                key_start=first,
                key_padding=self.padding,
            )
        past = first + self.padding.sum(-1)
        return AttentionMask(
            causal=self.causal,
            window=self.window,
            cu_seqlens=torch.stack([torch.zeros_like(first), first, past], dim=-1),
            key_padding=self.padding,
        )

    def first_key(self, batch: int) -> torch.Tensor:
        """[batch]: index of the first real key."""
        if self.padding is None:
            return torch.zeros(batch, dtype=torch.long)
        return self.padding.int().argmax(-1)

    def visible(self, batch: int, queries: int, keys: int) -> torch.Tensor:
        """[batch, keys]: how many real queries see each key."""
        if self.allowed is not None:
            return self.allowed[:, 0].sum(-2).expand(batch, -1)
        device = None if self.padding is None else self.padding.device
        key = torch.arange(keys, device=device)
        reach = keys if self.window is None else self.window
        first = (key if self.causal else key - reach + 1).clamp(min=keys - queries)
        last = (key + reach - 1).clamp(max=keys - 1)
        real = torch.ones(batch, keys, dtype=torch.bool) if self.padding is None else self.padding
        before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))  # [batch, keys + 1]
        return (before[:, last + 1] - before[:, first]).clamp(min=0) * real


class StructuredMask(torch.Tensor):
    """The 2-D padding mask that travels through the model, with its structure."""

    structure: MaskStructure


def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> StructuredMask:
    """The mask function that is registered with `AttentionMaskInterface`.

    The arguments are those of transformers' `sdpa_mask`; what `kwargs` holds beside them only says
    when a mask may be skipped.

    Raises:
        LensError: a static cache, padding inside a prompt, or a large mask of unknown pattern.
    """
    if int(q_offset) + q_length != int(kv_offset) + kv_length:
        raise LensError(
            f"the cache holds {kv_length} places for {int(q_offset) + q_length} tokens; capture needs "
            "a cache that grows: use cache_implementation='dynamic'"
        )
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(device, torch.bool)
        padding = None if bool(padding.all()) else padding
        if padding is not None and q_length == kv_length and bool(_has_holes(padding)):
            raise LensError(
                "attention_mask hides tokens in the middle of a prompt; pad at its start or end only"
            )
    parts = _parts(mask_function)
    if parts is not None:
        structure = MaskStructure(parts.causal, parts.window, padding)
    else:
        if q_length * kv_length > LARGEST_SPELLED_OUT:
            raise LensError(
                f"a mask of {q_length} × {kv_length} with the pattern {_name(mask_function)} has no "
                f"compact form; capture at most {int(LARGEST_SPELLED_OUT**0.5)} tokens of this model"
            )
        allowed = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert allowed is not None  # only skipped masks are None
        structure = _spelled_out(allowed)
    carrier = (
        padding if padding is not None else torch.ones(batch_size, kv_length, dtype=torch.bool)
    )
    mask = carrier.to(device).as_subclass(StructuredMask)
    mask.structure = structure
    return mask


def structure_of(
    attention_mask: torch.Tensor | None, is_causal: bool, sliding_window: int | None
) -> MaskStructure:
    """Structure of the mask that reached a layer.

    Without a mask, `is_causal` and `sliding_window` of the layer say it, as for flash attention.

    Raises:
        LensError: a mask that the model made itself and that is not a boolean or additive 4-D tensor.
    """
    if attention_mask is None:
        return MaskStructure(is_causal, sliding_window)
    structure = getattr(attention_mask, "structure", None)
    if structure is not None:
        return structure
    if attention_mask.dim() == 4:
        if attention_mask.dtype == torch.bool:
            return _spelled_out(attention_mask)
        hidden = attention_mask <= torch.finfo(attention_mask.dtype).min / 2
        if bool((hidden | (attention_mask == 0)).all()):
            return _spelled_out(~hidden)
    raise LensError(
        f"the model made an attention mask of its own, {attention_mask.dtype} of shape "
        f"{tuple(attention_mask.shape)}, that capture does not understand; it reads masks made by "
        "transformers.masking_utils, and boolean or 0/-inf masks [batch, 1, queries, keys]"
    )


def _has_holes(padding: torch.Tensor) -> torch.Tensor:
    starts = padding.int().diff(dim=-1, prepend=torch.zeros_like(padding[:, :1]).int()) == 1
    return (starts.sum(-1) > 1).any()


def _spelled_out(allowed: torch.Tensor) -> MaskStructure:
    queries, keys = allowed.shape[-2:]
    looks_ahead = bool(allowed.triu(1 + keys - queries).any())
    return MaskStructure(causal=not looks_ahead, allowed=allowed)


@dataclass
class _Parts:
    causal: bool = False
    window: int | None = None
    backward_window: int | None = None  # hides keys that are too old, and no later ones


def _parts(mask_function: Callable) -> _Parts | None:
    """What a composed mask function consists of; None if a part is unknown."""
    parts = _Parts()
    if not _collect(mask_function, parts):
        return None
    if parts.backward_window is not None:
        if not parts.causal:
            return None
        windows = (parts.window, parts.backward_window)
        parts.window = min(window for window in windows if window is not None)
    return parts


def _collect(function: Callable, parts: _Parts) -> bool:
    if function is causal_mask_function:
        parts.causal = True
        return True
    if function is bidirectional_mask_function:
        return True
    inner = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    match _name(function).split(".")[0]:
        case "and_masks":
            return all(_collect(part, parts) for part in inner["mask_functions"])
        case "sliding_window_overlay" if parts.backward_window is None:
            parts.backward_window = inner["sliding_window"]
            return True
        case "sliding_window_bidirectional_overlay" if parts.window is None:
            parts.window = inner["sliding_window"] + 1
            return True
    return False


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
