"""Names of a room, loaded on first use: its `__init__.pyi` lists them, for type checkers and for us."""

from collections.abc import Callable
from typing import Any

import lazy_loader


def attach(
    module: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose stub lies beside its `__init__.py`.

    Args:
        module, file: its `__name__` and `__file__`.
    """
    load, names, public = lazy_loader.attach_stub(module, file)

    def get(name: str) -> Any:
        if name not in public:
            raise AttributeError(
                f"module {module!r} has no attribute {name!r}; it has {', '.join(public)}"
            )
        return load(name)

    return get, names, public
