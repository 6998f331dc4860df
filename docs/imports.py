"""Which module imports which, read from the files: for the rules of the house and for its picture."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from docs.public import PACKAGES


def module_files(packages: Mapping[str, Path] = PACKAGES) -> dict[str, list[Path]]:
    """Dotted name -> its file, and the stub that says what it loads on first use."""
    found: dict[str, list[Path]] = {}
    for package, folder in packages.items():
        for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.pyi")]):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found.setdefault(".".join(parts).removesuffix(".__init__"), []).append(file)
    return found


def arrows_of(files: Mapping[str, list[Path]]) -> dict[str, set[str]]:
    """Module -> the modules among these that it imports, anywhere in it: lazily and for types too."""
    found: dict[str, set[str]] = {}
    for name, several in files.items():
        modules = set()
        for file in several:
            for one in imported(name, ast.parse(file.read_text())):
                while one and one not in files:  # a name of a module -> the module
                    one = one.rpartition(".")[0]
                modules.add(one)
        found[name] = modules - {"", name}
    return found


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a file of module `name` imports."""
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # a relative import stands in the stub of a package alone, and means its inside
            home = ".".join(filter(None, [name if node.level else "", node.module]))
            yield from (f"{home}.{alias.name}" for alias in node.names)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Those of a tree at any depth; what stands inside an expression is none."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, field, ())
        for one in inner if isinstance(inner, list) else ():
            yield one
            yield from _statements(one)
