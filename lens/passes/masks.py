"""Masks as a few numbers instead of N×N: what transformers' mask functions say, kept as structure.

transformers builds one mask per layer type by composing small functions (causal, window, padding) and
asks the registered mask function to turn them into a tensor. Ours reads the composition and hands on
a tensor that has the shape of that mask, takes no memory and carries the structure. A model that
computes with it gets `eager`'s own mask. That mask, and patterns that are not known here, are spelled
out, up to `LARGEST_SPELLED_OUT` entries, never guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lens_kernels import AttentionMask
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from lens.common.errors import LensError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped
    from torch import Tensor

LARGEST_SPELLED_OUT = 8192 * 8192
HIDDEN = (
    -9e3
)  # what is added to a logit to hide its key: -10000 in some models, the least number in most


@dataclass(frozen=True)
class MaskStructure:
    """Which keys a query sees.

    Attributes:
        causal: no key after the query; the last query stands on the last key.
        window: keys at a distance below this, or None; both ways unless causal.
        padding: bool [batch, keys], True for a real key; None when all are.
        allowed: bool [batch, 1, queries, keys], which says all of the above itself, or None.
        start: position of key 0 among all tokens so far; above 0 where a cache has dropped older keys.
        first: [batch], position of the first real token; None: 0 unless `padding` says else.
        placed: whether `start` and `first` are known.
        cross: whether the keys are of another sequence than the queries; `padding` is of the keys then.
    """

    causal: bool
    window: int | None = None
    padding: Bool[Tensor, "batch keys"] | None = None
    allowed: Bool[Tensor, "batch 1 queries keys"] | None = None
    start: int = 0
    first: Int[Tensor, "batch"] | None = None
    placed: bool = True
    cross: bool = False

    def for_kernel(self, queries: int) -> AttentionMask:
        """The mask as `lens_kernels` takes it; padded queries see nothing."""
        if self.padding is None or self.allowed is not None:
            return AttentionMask(causal=self.causal, window=self.window, allowed=self.allowed)
        first = self.first_key(len(self.padding))
        if self.cross or queries < self.padding.shape[1]:  # or cached: every query is a real token
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

    def seen_by(self, queries: Int[Tensor, "queries"], keys: int) -> Bool[Tensor, "queries keys"]:
        """bool [queries, keys]: which keys these queries (their places) of the first prompt see."""
        if self.allowed is not None:
            return self.allowed[0, 0, queries]
        key = torch.arange(keys, device=queries.device)
        behind = queries[:, None] - key
        seen = (
            torch.ones_like(behind, dtype=torch.bool) if self.padding is None else self.padding[0]
        )
        if self.causal:
            seen = seen & (behind >= 0)
        if self.window is not None:
            seen = seen & (behind.abs() < self.window)
        return seen.expand_as(behind)

    def first_key(self, batch: int) -> Int[Tensor, "batch"]:
        """[batch]: index of the first real key."""
        if self.padding is None:
            return torch.zeros(batch, dtype=torch.long)
        return self.padding.int().argmax(-1)

    def first_token(self, batch: int) -> Int[Tensor, "batch"]:
        """[batch]: where the first real token stands among the keys; negative where a cache dropped it."""
        if self.first is not None:
            return self.first - self.start
        return self.first_key(batch) - (self.start if self.padding is None else 0)

    def without_last(self, count: int) -> MaskStructure:
        """The mask without the last queries, which are the last keys too."""
        padding, allowed = self.padding, self.allowed
        return replace(
            self,
            padding=None if padding is None else padding[:, :-count],
            allowed=None if allowed is None else allowed[..., :-count, :-count],
        )

    def hides_next(self, tokens: int) -> Bool[Tensor, "before"]:
        """bool [tokens - 1] of queries that are the keys, of the first prompt: the next token is seen by none up to there."""
        key = torch.arange(tokens)
        if self.allowed is None:
            return (key[:-1] >= 0) & self.causal
        furthest = torch.where(self.allowed[0, 0].cpu(), key, -1).amax(-1).cummax(-1).values
        return furthest[:-1] <= key[:-1]

    def ranges(self) -> Int[Tensor, "2 queries"] | None:
        """First key that each query of one prompt sees and one past its last, where `allowed` says it; None where it does
        not, or a query sees keys with others between."""
        if self.allowed is None or len(self.allowed) > 1:
            return None
        seen = self.allowed[0, 0].cpu()
        first, past = seen.int().argmax(-1), seen.shape[-1] - seen.flip(-1).int().argmax(-1)
        return torch.stack([first, past]) if bool((past - first == seen.sum(-1)).all()) else None

    def visible(self, batch: int, queries: int, keys: int) -> Int[Tensor, "batch keys"]:
        """[batch, keys]: how many real queries see each key."""
        if self.allowed is not None:
            return self.allowed[:, 0].sum(-2).expand(batch, -1)
        if self.cross:
            every = (
                torch.ones(batch, keys, dtype=torch.bool) if self.padding is None else self.padding
            )
            return every * queries
        device = None if self.padding is None else self.padding.device
        key = torch.arange(keys, device=device)
        reach = keys if self.window is None else self.window
        first = (key if self.causal else key - reach + 1).clamp(min=keys - queries)
        last = (key + reach - 1).clamp(max=keys - 1)
        real = torch.ones(batch, keys, dtype=torch.bool) if self.padding is None else self.padding
        before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))  # [batch, keys + 1]
        return (before[:, last + 1] - before[:, first]).clamp(min=0) * real


class StructuredMask(torch.Tensor):
    """Stands for `eager`'s mask, [batch, 1, queries, keys] of 0 and the least number, in no memory."""

    structure: MaskStructure
    spelled_out: Callable[[], torch.Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Sizes and moves are answered without it; whatever reads its entries gets the mask itself."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _SIZES or name in _MOVES:
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **kwargs)
            mask = args[0]
            if not isinstance(found, torch.Tensor):
                return found
            if name in _MOVES and (found.shape, found.dtype) == (mask.shape, mask.dtype):
                return mask
        args, kwargs = tree_map_only(
            StructuredMask, lambda mask: mask.spelled_out(), (args, kwargs)
        )
        return func(*args, **kwargs)


_SIZES = {
    "__get__",
    "__len__",
    "__hash__",
    "dim",
    "size",
    "numel",
    "is_floating_point",
    "get_device",
}
_MOVES = {"__getitem__", "to", "float", "contiguous", "detach", "type_as", "requires_grad_"}


def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Shaped[Tensor, "batch keys"] | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> StructuredMask:
    """The mask function that is registered with `AttentionMaskInterface`.

    The arguments are those of transformers' `sdpa_mask`; what `kwargs` holds beside them only says
    when a mask may be skipped.

    Raises:
        LensError: a static cache, or a large mask of unknown pattern.
    """
    parts = _parts(mask_function)
    sees_all = parts is not None and not parts.causal and parts.window is None
    if int(q_offset) + q_length != int(kv_offset) + kv_length and not sees_all:
        raise LensError(
            f"{int(q_offset) + q_length} tokens attend to {kv_length} places: another sequence "
            "(cross-attention), or a cache of fixed size; capture needs one sequence and a cache that grows "
            "(cache_implementation='dynamic')"
        )
    padding = first = None
    if attention_mask is not None:
        if not bool(attention_mask.all()):
            first = attention_mask.to(device).int().argmax(-1)
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(device, torch.bool)
        padding = None if bool(padding.all()) else padding
    arguments = (
        *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask),
    )
    has_holes = padding is not None and q_length == kv_length and bool(_has_holes(padding))
    if parts is not None and not has_holes:
        structure = MaskStructure(parts.causal, parts.window, padding)
    else:
        what = "holes" if has_holes else f"the pattern {_name(mask_function)}"
        refuse_large(q_length, kv_length, what)
        allowed = sdpa_mask(
            *arguments, allow_is_causal_skip=False, use_vmap=use_vmap, device=device
        )
        assert allowed is not None  # only skipped masks are None
        structure = replace(_spelled_out(allowed), padding=padding, placed=True)
    structure = replace(structure, start=int(kv_offset), first=first)
    dtype = kwargs.get("dtype", torch.float32)
    made: list[torch.Tensor] = []

    def spelled_out() -> torch.Tensor:
        if not made:
            refuse_large(q_length, kv_length, "its entries, which the model asks for,")
            made.append(eager_mask(*arguments, dtype=dtype, use_vmap=use_vmap, device=device))
        return made[0]

    stub = torch.zeros((), dtype=dtype, device=device).expand(batch_size, 1, q_length, kv_length)
    mask = stub.as_subclass(StructuredMask)
    mask.structure, mask.spelled_out = structure, spelled_out
    return mask


def refuse_large(queries: int, keys: int, what: str) -> None:
    """Raises LensError: a mask that must be spelled out and has more than `LARGEST_SPELLED_OUT` entries."""
    if queries * keys > LARGEST_SPELLED_OUT:
        raise LensError(
            f"a mask of {queries} × {keys} with {what} has no compact form; capture at most "
            f"{int(LARGEST_SPELLED_OUT**0.5)} tokens of this model"
        )


def structure_of(
    attention_mask: Shaped[Tensor, "..."] | None,
    is_causal: bool,
    sliding_window: int | None,
    queries: int,
) -> tuple[MaskStructure, Float[Tensor, "..."] | None]:
    """Structure of the mask that reached a layer, and what it adds to logits besides, if anything.

    Without a mask, `is_causal` and `sliding_window` of the layer say it, as for flash attention.

    Raises:
        LensError: a mask that the model made itself and that is not a boolean or additive 4-D tensor.
    """
    if attention_mask is None:
        return MaskStructure(is_causal, sliding_window), None
    structure = getattr(attention_mask, "structure", None)
    if structure is not None:
        return structure, None
    if attention_mask.dim() != 4 or not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        raise LensError(
            f"the model made an attention mask of its own, {attention_mask.dtype} of shape "
            f"{tuple(attention_mask.shape)}, that capture does not understand; it reads masks made by "
            "transformers.masking_utils, and boolean or additive masks [batch, heads, queries, keys]"
        )
    allowed, added = split(attention_mask)
    if allowed is None or bool(allowed.all()):
        return MaskStructure(causal=False), added
    allowed = allowed.expand(-1, -1, queries, -1)
    if bool((allowed != allowed[:, :1]).any()):
        raise LensError(
            "the model hides other keys from one head than from another, and a trace has one mask per layer"
        )
    return _spelled_out(allowed[:, :1]), added


def with_chosen(
    structure: MaskStructure, indices: torch.Tensor, queries: int, keys: int
) -> MaskStructure:
    """The mask of rows that see their chosen keys alone (DeepSeek's sparse attention).

    Args:
        structure: what they would see without the choice.
        indices: [batch, queries, chosen], positions among the keys; what the mask hides stays hidden.
        queries, keys: sizes.

    Raises:
        LensError: more than `LARGEST_SPELLED_OUT` entries.
    """
    refuse_large(queries, keys, "keys that are chosen for each query")
    nothing = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    allowed = nothing.scatter(-1, indices.long(), True)[:, None]
    place = torch.arange(keys, device=indices.device)
    behind = place[keys - queries :, None] - place
    if structure.allowed is not None:
        allowed = allowed & structure.allowed.to(allowed.device)
    elif structure.causal:
        allowed = allowed & (behind >= 0)
    if structure.window is not None:
        allowed = allowed & (behind.abs() < structure.window)
    if structure.padding is not None:
        allowed = allowed & structure.padding[:, None, None].to(allowed.device)
    return replace(structure, window=None, allowed=allowed)


def split(
    mask: Shaped[Tensor, "*axes"],
) -> tuple[Bool[Tensor, "*axes"] | None, Float[Tensor, "*axes"] | None]:
    """A boolean or additive mask as what it lets through and what it adds there; None for nothing."""
    if mask.dtype == torch.bool:
        return mask, None
    hidden = mask <= HIDDEN
    added = mask.masked_fill(hidden, 0)
    return (~hidden if bool(hidden.any()) else None), (added if bool(added.any()) else None)


def _has_holes(padding: torch.Tensor) -> torch.Tensor:
    starts = padding.int().diff(dim=-1, prepend=torch.zeros_like(padding[:, :1]).int()) == 1
    return (starts.sum(-1) > 1).any()


def _spelled_out(allowed: torch.Tensor) -> MaskStructure:
    queries, keys = allowed.shape[-2:]
    looks_ahead = bool(allowed.triu(1 + keys - queries).any())
    seen = allowed[:, 0].any(-2)  # [batch, keys]
    return MaskStructure(
        causal=not looks_ahead,
        allowed=allowed,
        first=seen.int().argmax(-1),
        placed=queries == keys
        or bool(seen[:, 0].all()),  # else padding, or out of a window's reach
    )


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
