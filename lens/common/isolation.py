"""What runs a model runs alone: no other thread hangs something on its modules, no default device takes its tensors.

What has to stand in the place of a function that all models share stands there for one thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lens.common.errors import LensError

_LOCK = threading.RLock()
_OWNERS: dict[int, tuple[int, int]] = {}
"""`id` of modules and configurations at work -> thread, and how many blocks deep."""


@contextmanager
def owned(module: Any) -> Iterator[None]:
    """`module`, which may be one already, belongs to this thread inside the block; so may a configuration.

    Hooks and attention functions are the module's: those of two threads would each see the other's passes.

    Raises:
        LensError: another thread is inside such a block of the same module.

    Example:
        >>> with owned(model.module):
        ...     logits = model.logits("It was the best of times")
    """
    thread = threading.get_ident()
    with _LOCK:
        owner, depth = _OWNERS.get(id(module), (thread, 0))
        if owner != thread:
            raise LensError(
                f"another thread works with this {type(module).__name__} (captures, edits or measures it); "
                "one after another, or each thread with a model that it loads itself"
            )
        _OWNERS[id(module)] = owner, depth + 1
    try:
        yield
    finally:
        with _LOCK:
            owner, depth = _OWNERS.pop(id(module))
            if depth > 1:
                _OWNERS[id(module)] = owner, depth - 1


class _PerThread:
    """A function that some threads have replaced, each for itself."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.of_thread: dict[int, list[Callable[..., Any]]] = {}  # of each block, the last one acts

    def here(self) -> Callable[..., Any]:
        """That of this thread."""
        return self.of_thread.get(threading.get_ident(), [self.own])[-1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.here()(*args, **kwargs)


@contextmanager
def replaced(
    owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """The function `owner.name` is `make` of it inside the block, for this thread; all others have it as it was.

    Example:
        >>> with replaced(torch.backends.mha, "get_fastpath_enabled", lambda own: lambda: False):
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    thread = threading.get_ident()
    with _LOCK:
        found = getattr(owner, name)
        if not isinstance(found, _PerThread):
            found = _PerThread(found)
            setattr(owner, name, found)
        new = make(found.here())
        found.of_thread.setdefault(thread, []).append(new)
    try:
        yield
    finally:
        with _LOCK:
            found.of_thread[thread].remove(new)
            if not found.of_thread[thread]:
                del found.of_thread[thread]
            if not found.of_thread:
                setattr(owner, name, found.own)


def on_cpu() -> AbstractContextManager[Any]:
    """Tensors made without a device are made on the CPU inside the block, whatever `torch.set_default_device` says.

    Example:
        >>> with on_cpu():
        ...     places = torch.arange(4)
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or torch.empty(0).is_cpu:  # known sooner than get_default_device
        return nullcontext()
    return torch.device("cpu")
