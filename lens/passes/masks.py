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
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from lens.common.errors import LensError
from lens.passes.structures import BlockStructure, MaskStructure, bounds_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped
    from torch import Tensor

LARGEST_SPELLED_OUT = 8192 * 8192
HIDDEN = -9e3
"""What is added to a logit to hide its key, or less: -10000 in some models, the least number in most."""


class StructuredMask(torch.Tensor):
    """Stands for a mask [batch, 1, queries, keys], `eager`'s of 0 and the least number or a boolean one, in no memory."""

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
    if attention_mask is not None and not bool(attention_mask.all()):
        first = attention_mask.to(device).int().argmax(-1)
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(device, torch.bool)
        padding = None if bool(padding.all()) else padding
    sizes = batch_size, q_length, kv_length
    arguments = *sizes, q_offset, kv_offset, mask_function, attention_mask
    shape = batch_size, 1, q_length, kv_length
    has_holes = padding is not None and q_length == kv_length and bool(_has_holes(padding))
    bounds = None
    if parts is not None and parts.blocks is not None:
        if padding is None and not kv_offset:
            bounds = bounds_of(parts.blocks, kv_length)
        if bounds is not None and bool((bounds.diff(dim=1) <= 1).all()):  # blocks of one token
            parts, bounds = _Parts(causal=True), None
        else:
            parts = None

    def allowed() -> torch.Tensor:
        found = sdpa_mask(*arguments, allow_is_causal_skip=False, use_vmap=use_vmap, device=device)
        assert found is not None  # only skipped masks are None
        return found

    if bounds is not None:
        structure = BlockStructure(
            causal=False,
            allowed=_stub(torch.bool, device, shape, allowed),
            bounds=bounds.to(device).expand(batch_size, -1),
            queries=q_length,
        )
    elif parts is not None and not has_holes:
        structure = MaskStructure(parts.causal, parts.window, padding)
    else:
        what = "holes" if has_holes else f"the pattern {_name(mask_function)}"
        refuse_large(q_length, kv_length, what)
        structure = replace(_spelled_out(allowed()), padding=padding, placed=True)
    structure = replace(structure, start=int(kv_offset), first=first)
    dtype = kwargs.get("dtype", torch.float32)
    entries = partial(eager_mask, *arguments, dtype=dtype, use_vmap=use_vmap, device=device)
    mask = _stub(dtype, device, shape, entries)
    mask.structure = structure
    return mask


def _stub(
    dtype: torch.dtype,
    device: torch.device | str,
    shape: tuple[int, ...],
    make: Callable[[], torch.Tensor],
) -> StructuredMask:
    """In the memory of one number; what reads its entries has them made."""
    made: list[torch.Tensor] = []

    def spelled_out() -> torch.Tensor:
        if not made:
            refuse_large(shape[-2], shape[-1], "its entries, which are asked for,")
            made.append(make())
        return made[0]

    number = torch.zeros((), dtype=dtype, device=device)
    mask = number.expand(shape).as_subclass(StructuredMask)
    mask.spelled_out = spelled_out
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
    allowed = allowed & structure.pairs(queries, keys, indices.device)[:, None]
    return replace(structure.with_allowed(allowed), window=None)


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
    if queries == keys and not looks_ahead:
        allowed = _without_padded(allowed)
    seen = allowed[:, 0].any(-2)  # [batch, keys]
    # where the first cached key is not seen it is padding, or out of a window's reach
    placed = queries == keys or bool(seen[:, 0].all())
    first = seen.int().argmax(-1)
    return MaskStructure(causal=not looks_ahead, allowed=allowed, first=first, placed=placed)


def _without_padded(allowed: torch.Tensor) -> torch.Tensor:
    """The same where queries of padding on the right see nothing, as they do under other masks.

    Such a mask hides the keys of padding alone, so that its queries would be counted among those that see a key. They
    stand behind the last key that is seen, and see a run of keys up to it.
    """
    rows = allowed[:, 0]
    keys = rows.shape[-1]
    place = torch.arange(keys, device=rows.device)
    # [batch], one past the last key that is seen
    past = torch.where(rows.any(-2), place + 1, 0).amax(-1)
    # where no query sees itself, the last one is none of padding
    itself = rows.diagonal(dim1=-2, dim2=-1).gather(1, (past - 1).clamp(min=0)[:, None])
    padded = (place >= past[:, None]) & itself
    count, first = rows.sum(-1), rows.int().argmax(-1)
    runs = (count == 0) | (
        rows.any(-1) & (first + count == past[:, None]) & _is_run(rows, first, count)
    )
    if not bool(padded.any()) or not bool((runs | ~padded).all()):
        return allowed
    return allowed & ~padded[:, None, :, None]


def _is_run(rows: torch.Tensor, first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool [batch, queries]: the keys of a row stand side by side."""
    last = rows.shape[-1] - 1 - rows.flip(-1).int().argmax(-1)
    return last - first + 1 == count


@dataclass
class _Parts:
    causal: bool = False
    window: int | None = None
    backward_window: int | None = None  # hides keys that are too old, and no later ones
    blocks: torch.Tensor | None = None  # [batch, tokens], block of each token that sees it whole


def _parts(mask_function: Callable) -> _Parts | None:
    """What a composed mask function consists of; None if a part is unknown."""
    if (blocks := _blocks(mask_function)) is not None:
        return _Parts(causal=True, blocks=blocks)
    parts = _Parts()
    if not _collect(mask_function, parts):
        return None
    if parts.backward_window is not None:
        if not parts.causal:
            return None
        windows = (parts.window, parts.backward_window)
        parts.window = min(window for window in windows if window is not None)
    return parts


def _blocks(mask_function: Callable) -> torch.Tensor | None:
    """[batch, tokens], block of each token, of a mask that is causal or in one block with the query; None of another."""
    if _name(mask_function).split(".")[0] != "or_masks":
        return None
    functions = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    if len(functions) != 2 or functions[0] is not causal_mask_function:
        return None
    if _name(functions[1]).split(".")[0] != "blockwise_overlay":
        return None
    return inspect.getclosurevars(functions[1]).nonlocals["block_sequence_ids"]


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
