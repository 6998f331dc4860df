"""The public names: what the rooms list in `__all__`. Read by the site and by the tests of examples."""

import ast
import importlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "lens": ROOT / "lens",
    "lens_kernels": ROOT / "kernels" / "lens_kernels",
    "lens_analyses": ROOT / "analyses" / "lens_analyses",
    "lens_dashboards": ROOT / "dashboards" / "lens_dashboards",
}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the four packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


@cache
def rooms() -> dict[str, list[str]]:
    """Dotted name -> public names of every folder that lists them, without an underscore in its path."""
    return {
        name: list(importlib.import_module(name).__all__)
        for name, file in modules().items()
        if file.name == "__init__.py" and "._" not in name and _lists_names(file)
    }


def _lists_names(file: Path) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == "__all__" and isinstance(node.ctx, ast.Store)
        for node in ast.walk(ast.parse(file.read_text()))
    )
