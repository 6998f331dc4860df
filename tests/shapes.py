"""Runs code whose functions check the shapes in their signatures; nothing is checked elsewhere.

`outcomes` imports modules in a process of its own, so that jaxtyping and beartype check every call of
what they define, and makes each call in the dictionary `CALLS` of a module of the tests.

Shapes are written for type checkers (`if TYPE_CHECKING: from jaxtyping import Float`), so users
import neither; here `TYPE_CHECKING` is True while the modules are imported.
"""

import functools
import hashlib
import importlib
import json
import sys
import tempfile
import typing
from pathlib import Path

import beartype
import jaxtyping

from tests.analyses.started import forked

ROOT = Path(__file__).parents[1]

checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
"""The checker that the import hook puts around each function; an int is a float."""


PLAIN = "plain "


def checker(name: str) -> typing.Callable:
    """The same whatever the name, by which the import hook names its bytecode."""
    return checked


def hook(modules: typing.Sequence[str]) -> typing.Any:
    """Checks what these modules define, in a `with` block that imports them.

    What a checked module imports keeps its bytecode by the name of the hook's checker too, checked or not. So
    each list of modules has a name: one list would run what another list left unchecked.
    """
    name = hashlib.md5(" ".join(modules).encode()).hexdigest()
    return jaxtyping.install_import_hook(modules, f"tests.shapes.checker('{name}')")


@functools.cache
def outcomes(calls: str, *modules: str) -> dict[str, str | None]:
    """Name of each call in `calls.CALLS` -> None, or the error that it raised, in one line.

    Args:
        calls: a module of the tests.
        modules: those whose signatures are checked, and no others, in the order in which they are imported;
            one with `PLAIN` before its name is not checked, and the type-checking imports of what it
            imports stay off.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        process = forked(main, str(file), calls, modules)
        process.join()
        assert process.exitcode == 0
        return json.loads(file.read_text())


def main(file: str, calls: str, modules: tuple[str, ...]) -> None:
    """Makes the calls in this process and writes their outcomes as JSON; what it was forked with of ours is imported anew."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("lens", "lens_kernels", "lens_analyses"):
            del sys.modules[name]
    checked = [module for module in modules if not module.startswith(PLAIN)]
    with hook(checked):
        for module in ("plain torch", "plain numpy", "plain lens", *modules):
            typing.TYPE_CHECKING = module in checked
            importlib.import_module(module.removeprefix(PLAIN))
    typing.TYPE_CHECKING = False
    found = {name: _outcome(call) for name, call in importlib.import_module(calls).CALLS.items()}
    Path(file).write_text(json.dumps(found))


def _outcome(call: typing.Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
