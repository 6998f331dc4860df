"""Chooses the backend, and says why.

`auto` takes the first backend of the device's order that can do all of the problem: on CUDA
`triton`, then `torch`; on CPU `cpu` (compiled), then `torch`. The reference is only run when it is
asked for by name. A backend asked for by name that cannot do it raises with its reason.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from lens_kernels.problem import BackendResult, Problem

MODULES = {
    "triton": "lens_kernels.triton_backend",
    "cpu": "lens_kernels.cpu",
    "torch": "lens_kernels.tiled",
    "reference": "lens_kernels.reference",
}
"""Backend name -> module, imported when it is first considered."""

_AUTO = {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}


class Backend(Protocol):
    """What a backend module offers; see problem.py."""

    def supports(self, problem: Problem) -> str | None: ...

    def run(self, problem: Problem) -> BackendResult: ...


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem, and why each other one does not.

    Attributes:
        chosen: the backend's name.
        reasons: name -> one line, for every backend.
    """

    chosen: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.chosen}: {self.reasons[self.chosen]}"]
        others = (name for name in self.reasons if name != self.chosen)
        return "\n".join([*lines, *(f"not {name}: {self.reasons[name]}" for name in others)])


def load(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if name not in MODULES:
        raise ValueError(f"unknown backend {name!r}; use auto, {', '.join(MODULES)}")
    return cast(Backend, importlib.import_module(MODULES[name]))


def _obstacle(name: str, problem: Problem) -> str | None:
    try:
        return load(name).supports(problem)
    except (ModuleNotFoundError, AttributeError) as error:
        return f"not part of this installation ({error})"


def explain_problem(problem: Problem, backend: str = "auto") -> Explanation:
    """Which backend would run `problem`, and why.

    Raises:
        ValueError: for an unknown backend, or one asked for by name that cannot do it.
    """
    obstacles = {name: _obstacle(name, problem) for name in MODULES}
    if backend != "auto":
        load(backend)
        obstacle = obstacles[backend]
        if obstacle is not None:
            raise ValueError(
                f"backend {backend!r} cannot do this: {obstacle}; use backend='auto' to let one "
                "that can be chosen"
            )
        reasons = {name: obstacle or "not asked for" for name, obstacle in obstacles.items()}
        return Explanation(backend, reasons | {backend: "asked for by name"})
    order = _AUTO.get(problem.device.type, ("torch",))
    chosen = next(name for name in order if obstacles[name] is None)
    reasons = {
        name: obstacle
        or ("only by name" if name not in order else f"{chosen} comes first on this device")
        for name, obstacle in obstacles.items()
    }
    first = f"first choice on {problem.device.type}"
    fallback = f"serves every problem on {problem.device.type}, slower"
    return Explanation(chosen, reasons | {chosen: first if chosen == order[0] else fallback})
