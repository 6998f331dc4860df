"""Which keys an edit means: positions, masks, names or functions, found anew at every layer and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from lens.common.choices import is_whole
from lens.common.errors import LensError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


@dataclass(frozen=True, eq=False)
class KeysAt:
    """The keys of one attention call.

    Attributes:
        layer: attention layer, from 0.
        step: forward pass inside the block, from 0.
        positions: [batch, keys], place of each key in its prompt, from 0 at the first real token;
            negative for padding before it.
        tokens: [batch, keys], token ids, or None where they are not known.
    """

    layer: int
    step: int
    positions: Int[torch.Tensor, "batch keys"]
    tokens: Int[torch.Tensor, "batch keys"] | None


Keys: TypeAlias = str | Sequence[int] | torch.Tensor | Callable[[KeysAt], torch.Tensor]
"""`"first"`; positions; a bool mask over the prompt's positions; or a function of `KeysAt` that
returns bool [keys] or [batch, keys]."""


def check_keys(name: str, keys: Keys) -> None:
    """Raises LensError unless `keys` is one of `Keys`."""
    if callable(keys):
        return
    if isinstance(keys, str):
        if keys != "first":
            raise LensError(f"{name} by name can only be 'first', got {keys!r}; give positions")
        return
    keys = _tensor_of(keys)
    if isinstance(keys, torch.Tensor) and keys.dtype == torch.bool:
        if keys.dim() != 1:
            raise LensError(f"{name} as a mask must be [positions], got {list(keys.shape)}")
        return
    numbers: Any = keys.tolist() if isinstance(keys, torch.Tensor) else keys
    if not isinstance(numbers, Sequence) or not all(
        is_whole(number) and number >= 0 for number in numbers
    ):
        raise LensError(
            f"{name} must be 'first', positions from 0, a bool tensor or a function, got {keys!r}"
        )


def check_fixed_keys(name: str, keys: Keys, what: str) -> None:
    """As `check_keys`, for what has the same keys in every layer.

    Raises:
        LensError: a function of the call, too.
    """
    check_keys(name, keys)
    if callable(keys):
        raise LensError(f"{name} of {what} are the same in every layer; give positions")


def positions_of(keys: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    """Positions in any form as integers, those that a mask holds True at."""
    keys = _tensor_of(keys)
    if not isinstance(keys, torch.Tensor):
        return tuple(map(int, keys))
    return tuple((keys.nonzero()[:, 0] if keys.dtype == torch.bool else keys).tolist())


def _tensor_of(keys: Any) -> Any:
    """An array of whole numbers or truth values as a tensor; anything else as it is."""
    if isinstance(keys, np.ndarray) and keys.dtype.kind in "biu":
        return torch.from_numpy(np.array(keys, bool if keys.dtype.kind == "b" else np.int64))
    return keys


def members(name: str, keys: Keys, at: KeysAt) -> Bool[torch.Tensor, "batch keys"]:
    """bool [batch, keys]: which keys of this call are meant.

    Raises:
        LensError: a function returned something else.
    """
    positions, keys = at.positions, _tensor_of(keys)
    if isinstance(keys, str):
        return positions == 0
    if not callable(keys):
        chosen = torch.tensor(positions_of(keys), dtype=positions.dtype, device=positions.device)
        return torch.isin(positions, chosen)
    found = keys(at)
    shape = tuple(positions.shape)
    if (
        not isinstance(found, torch.Tensor)
        or found.dtype != torch.bool
        or tuple(found.shape) not in (shape, shape[1:])
    ):
        got = (
            f"{found.dtype} {list(found.shape)}"
            if isinstance(found, torch.Tensor)
            else type(found).__name__
        )
        raise LensError(
            f"the function for {name} must return a bool tensor {list(shape)} or {list(shape[1:])}, "
            f"got {got}"
        )
    return found.to(positions.device).expand(shape) & (positions >= 0)
