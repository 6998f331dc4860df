"""Names of a room, loaded on first use: its `__init__.pyi` lists them, for type checkers and for us.

A stub with an `__all__` advertises those alone: what it imports beside them is there, and not in `dir()`.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import lazy_loader

from lens.common.checked import checked


def attach(
    module: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose stub lies beside its `__init__.py`.

    Args:
        module, file: its `__name__` and `__file__`.
    """
    load, _, listed = lazy_loader.attach_stub(module, file)
    known = [name for name in listed if not name.startswith("__")]
    public = _advertised(Path(file).with_suffix(".pyi")) or known

    def get(name: str) -> Any:
        if name in known:
            found = checked(load(name))
            if isinstance(found, FunctionType):
                found.__module__ = module  # where pickle finds it
            if name in vars(sys.modules[module]):  # its file has the same name
                setattr(sys.modules[module], name, found)
            return found
        if not name.startswith("_") and importlib.util.find_spec(f"{module}.{name}"):
            return importlib.import_module(f"{module}.{name}")  # a room that is not advertised
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}; {_elsewhere(module, file, name)}it has "
            f"{', '.join(public)}"
        )

    return get, lambda: list(public), public


def _elsewhere(module: str, file: str, name: str) -> str:
    """Which other room of the house advertises a name, in an error."""
    if name.startswith("_"):  # asked for by Python, often
        return ""
    top, _, room = module.partition(".")
    house = Path(file).parents[bool(room)]
    rooms = [
        one.parent.name
        for one in sorted(house.glob("*/__init__.pyi"))
        if name in _advertised(one) + _given(one)
    ]
    rooms = [f"{top}.{one}.{name}" for one in rooms if one != room]
    return f"there is {' and '.join(rooms)}; " if rooms else ""


def _given(stub: Path) -> list[str]:
    """What a stub without an `__all__` imports."""
    lines = ast.parse(stub.read_text(encoding="utf-8")).body
    return [
        one.asname or one.name
        for line in lines
        if isinstance(line, ast.ImportFrom)
        for one in line.names
    ]


def _advertised(stub: Path) -> list[str]:
    """The `__all__` of a stub, or nothing."""
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []
