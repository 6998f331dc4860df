"""Arguments of another kind than asked for, refused by name and in one line, whichever function was given them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def check_tensors(**given: Any) -> None:
    """Raises TypeError: one that is neither a tensor nor None."""
    from torch import Tensor

    for name, one in given.items():
        if one is not None and not isinstance(one, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(one).__name__}")


def check_numbers(**given: Any) -> None:
    """Raises TypeError: a tensor whose numbers do not lie in memory, in rows, for a kernel to read."""
    import torch
    from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore
    from torch.autograd import forward_ad

    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise TypeError(
            "torch.jit.trace records torch's operations, and kernels are none: trace the model without them"
        )
    for name, one in given.items():
        if one is None:
            continue
        if one.layout != torch.strided or one.is_nested:
            kind = "nested" if one.is_nested else str(one.layout).removeprefix("torch.")
            raise TypeError(f"{name} is {kind}; give a dense tensor")
        if is_functorch_wrapped_tensor(one):
            raise TypeError(
                f"{name} comes from a transform of torch.func, which kernels do not know: give it a batch axis in place of "
                "vmap, and call backward() in place of grad"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(one).tangent is not None:
            raise TypeError(
                f"{name} has a forward derivative, which is not carried on; call backward()"
            )
        if hasattr(one, "fake_mode"):
            raise TypeError(f"{name} is a fake tensor and holds no numbers; give a real one")


def without_autocast(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """The function, with products in the types of its inputs though its caller asks for others by `torch.autocast`."""
    import torch

    @functools.wraps(function)
    def called(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return function(*args, **kwargs)
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return function(*args, **kwargs)

    return called


def check_kinds(kind: type | tuple[type, ...], **given: Any) -> None:
    """Raises TypeError: one that is neither of this kind nor None."""
    for name, one in given.items():
        if one is not None and not isinstance(one, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            said = " or ".join(each.__name__ for each in kinds)
            raise TypeError(f"{name} must be of type {said}, got {type(one).__name__}")


def check_names(name: str, given: Any) -> frozenset[str]:
    """One word or several; raises TypeError where they are none."""
    found = (
        [given] if isinstance(given, str) else [*given] if isinstance(given, Iterable) else [None]
    )
    names = [one for one in found if isinstance(one, str)]
    if len(names) == len(found):
        return frozenset(names)
    raise TypeError(f"{name} must be a list of names, got {type(given).__name__}")


def as_number(name: str, given: Any) -> float:
    """As a float, infinite where it is larger than all; raises TypeError where it is no number."""
    if not hasattr(given, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(given).__name__}")
    try:
        return float(given)
    except OverflowError:
        return math.inf if given > 0 else -math.inf
