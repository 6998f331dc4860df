"""What the tensors of a task must be: whole numbers, of one shape, one row a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.common.choices import check_lists, shown
from lens.common.errors import LensError


def whole(name: str, tensor: Tensor) -> Tensor:
    """As int64: torch reads numbers of other kinds as masks, or not at all.

    Raises:
        LensError: other numbers.
    """
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise LensError(f"{name} must be whole numbers, got {tensor.dtype}")
    return tensor.long()


def rows_of(rows: Any, count: int) -> Tensor:
    """Numbers of prompts as int64.

    Raises:
        LensError: there are not as many.
    """
    check_lists(rows=rows)
    try:
        found = whole("rows", torch.as_tensor(rows)) if len(rows) else torch.zeros(0).long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LensError(f"rows must be numbers of prompts, got {shown(rows)}") from error
    if found.dim() != 1 or not bool(((found >= 0) & (found < count)).all()):
        raise LensError(f"rows must be numbers 0 to {count - 1} of prompts, got {found.tolist()}")
    return found


def check_targets(sources: Tensor, targets: Tensor) -> None:
    """Raises LensError unless these are sources [prompts, ...] with targets [prompts, tokens]."""
    if sources.dim() < 2 or targets.dim() != 2 or targets.is_floating_point():
        raise LensError(
            "targets must be token ids [prompts, tokens] beside sources [prompts, ...], got the shapes "
            f"{list(targets.shape)} and {list(sources.shape)}"
        )
    if len(sources) != len(targets) or not targets.numel() or not sources.numel():
        raise LensError(f"each source needs a target; got {len(sources)} and {len(targets)}")


def check_same_shape(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """Raises LensError unless there is none, or it has the shape of the other."""
    if tensor is not None and tensor.shape != other.shape:
        shapes = f"{list(other.shape)}; got {list(tensor.shape)}"
        raise LensError(f"{name} must have the shape of {other_name}, {shapes}")


def range_of(tensor: Tensor) -> str:
    """`3 to 9`: the smallest and the largest number."""
    return f"{int(tensor.min())} to {int(tensor.max())}"
