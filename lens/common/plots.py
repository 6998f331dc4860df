"""Which figure draws which result.

Results know no figures: figure functions enter themselves here under the name of a result's class, and
`Result.plot` asks. So a result can be made without plotly, and drawn without the torch that made it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lens.common.errors import LensError

if TYPE_CHECKING:
    import plotly.graph_objects as go

_HOMES = ("lens.figures", "lens.runs.comparison.pictures")  # where figure functions are
_VIEWER = "lens_dashboards.notebook"
_SERVER = "lens_dashboards.server"
_OPENER = "lens.runs.opening"
_DRAWN: dict[str, tuple[Callable[..., Any], str]] = {}
_Drawing = TypeVar("_Drawing", bound=Callable[..., Any])


def draws(*names: str, of: Literal["result", "table"] = "result") -> Callable[[_Drawing], _Drawing]:
    """Enter a figure function for results of these classes.

    Args:
        names: of the classes, without their module.
        of: whether the function takes the result, or its `.table()`.

    Raises:
        ValueError: a class that has a figure already.
    """

    def enter(function: _Drawing) -> _Drawing:
        for name in names:
            if name in _DRAWN:
                raise ValueError(f"{name} is drawn by {_DRAWN[name][0].__name__} already")
            _DRAWN[name] = (function, of)
        return function

    return enter


def draw(result: Any, *args: Any, **options: Any) -> go.Figure:
    """The figure of a result; further arguments go to its figure function.

    Raises:
        LensError: nothing draws results of this class.
    """
    name = type(result).__name__
    if name not in _DRAWN:
        _load()
    if name not in _DRAWN:
        raise LensError(f"{name} has no figure; its numbers are in .table()")
    function, of = _DRAWN[name]
    return function(result.table() if of == "table" else result, *args, **options)


def viewer() -> Callable[..., Any]:
    """What shows a trace outside the dashboard.

    Raises:
        LensError: the dashboard is not installed.
    """
    return _of_dashboard(_VIEWER).view


def background(runs: Any) -> tuple[str, Callable[[], None]]:
    """Serve a folder of runs beside this program: the address, and what ends it.

    Raises:
        LensError: the dashboard is not installed.
    """
    return _of_dashboard(_SERVER).serve_beside(runs)


def opened(result: Any) -> Any:
    """A result in the dashboard, as `lens.open` shows it."""
    return importlib.import_module(_OPENER).open(result)


def _of_dashboard(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LensError(
            f"the view needs {error.name}; install it with pip install 'attention-lens[dashboard]'"
        ) from error


def _load() -> None:
    """Import every module that holds figure functions."""
    for home in _HOMES:
        module = importlib.import_module(home)
        for part in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{home}.{part.name}")
