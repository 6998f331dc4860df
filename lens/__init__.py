"""See what every attention head of a real model does, without building the N×N matrix.

>>> import lens
>>> model = lens.load("text-lm-3l")
>>> trace = lens.capture(model, "It was the best of times, it was the worst of times")
>>> lens.profile(trace)

Everything is loaded on first use: `import lens` itself brings neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens import (
        circuits,
        comparison,
        figures,
        heads,
        interchange,
        layers,
        metrics,
        prompts,
        redistribution,
        runs,
        sinks,
        tasks,
        vision,
    )
    from lens.captures.recorder import capturing
    from lens.captures.run import capture
    from lens.errors import LensError
    from lens.models.loaded import LoadedModel
    from lens.models.loading import load
    from lens.profiles import profile
    from lens.redistribution.editing import redistribute
    from lens.trace import AttentionTrace

__version__ = "0.1.0"

__all__ = [
    "AttentionTrace",
    "LensError",
    "LoadedModel",
    "capture",
    "capturing",
    "circuits",
    "comparison",
    "figures",
    "heads",
    "interchange",
    "layers",
    "load",
    "metrics",
    "profile",
    "prompts",
    "redistribute",
    "redistribution",
    "runs",
    "sinks",
    "tasks",
    "vision",
]

_MODULES = (
    "circuits",
    "comparison",
    "figures",
    "heads",
    "interchange",
    "layers",
    "metrics",
    "prompts",
    "redistribution",
    "runs",
    "sinks",
    "tasks",
    "vision",
)
_HOMES = {
    "AttentionTrace": "lens.trace",
    "LensError": "lens.errors",
    "LoadedModel": "lens.models.loaded",
    "capture": "lens.captures.run",
    "capturing": "lens.captures.recorder",
    "load": "lens.models.loading",
    "profile": "lens.profiles",
    "redistribute": "lens.redistribution.editing",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lens.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lens' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
