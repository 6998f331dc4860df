"""Chooses the backend, and says why.

`auto` takes the first backend of the device's order that can do all of the problem: on CUDA
`triton`, then `torch`; on CPU `cpu` (compiled), then `torch`. The reference is only run when it is
asked for by name. A backend asked for by name that cannot do it raises with its reason.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from lens_kernels.backward import Compute, Gradients, Saved, Upstream
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
    """What a backend module offers; see problem.py. The backward pass is optional."""

    def supports(self, problem: Problem) -> str | None: ...

    def run(self, problem: Problem) -> BackendResult: ...


class GradientBackend(Backend, Protocol):
    """A backend with a backward pass of its own."""

    def supports_gradients(self, problem: Problem) -> str | None: ...

    def gradients(self, saved: Saved, upstream: Upstream) -> Gradients: ...


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem, and why each other one does not.

    Attributes:
        chosen: the backend's name.
        why: one line: why it was chosen.
        obstacles: for every backend what it cannot do of this problem, or None.
        gradients: one line: what computes the backward pass, and why not the backend itself; None
            where no input asks for a gradient.
    """

    chosen: str
    why: str
    obstacles: dict[str, str | None]
    gradients: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.chosen}: {self.why}"]
        if self.gradients is not None:
            lines.append(f"gradients: {self.gradients}")
        for name, obstacle in self.obstacles.items():
            if name != self.chosen:
                lines.append(f"not {name}: {obstacle or 'it could, but is not asked for'}")
        return "\n".join(lines)


def load(name: str) -> Backend:
    """The backend module of that name.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"unknown backend {name!r}; use auto, {', '.join(MODULES)}")
    return cast(Backend, importlib.import_module(MODULES[name]))


def choose(problem: Problem, backend: str = "auto") -> str:
    """Which backend would run `problem`; the others are not asked.

    Raises:
        ValueError: for an unknown backend, or one asked for by name that cannot do it.
    """
    device = problem.device.type
    order = _AUTO.get(device, ("torch",)) if backend == "auto" else (backend,)
    obstacles = {}
    for name in order:
        obstacles[name] = load(name).supports(problem)
        if obstacles[name] is None:
            return name
    if backend != "auto":
        raise ValueError(
            f"backend {backend!r} cannot do this: {obstacles[backend]}; use backend='auto' for one "
            "that can"
        )
    listed = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
    raise RuntimeError(f"no backend can do this on {device}: {listed}")


def explain_problem(problem: Problem, backend: str = "auto") -> Explanation:
    """Which backend would run `problem`, and why.

    Raises:
        ValueError: for an unknown backend, or one asked for by name that cannot do it.
    """
    chosen = choose(problem, backend)
    obstacles = {name: load(name).supports(problem) for name in MODULES}
    if backend != "auto":
        return Explanation(
            backend, "asked for by name", obstacles, choose_gradients(problem, backend)[1]
        )
    device = problem.device.type
    if chosen == "torch":
        why = f"plain torch serves every problem on {device}; it is the slow one"
    else:
        why = f"the fast one on {device}"
    return Explanation(chosen, why, obstacles, choose_gradients(problem, chosen)[1])


def choose_gradients(problem: Problem, backend: str) -> tuple[Compute | None, str | None]:
    """The backward pass of a problem that `backend` runs, and a line that says which and why.

    (None, None) where no input asks for a gradient, (None, line) where the backend is
    differentiable by itself.
    """
    if not problem.needs_gradients:
        return None, None
    module = load(backend)
    if getattr(module, "DIFFERENTIABLE", False):
        return None, f"{backend}, by autograd"
    from lens_kernels import tiled_backward

    if not hasattr(module, "gradients"):
        return tiled_backward.gradients, "torch, panel by panel"
    own = cast(GradientBackend, module)
    obstacle = own.supports_gradients(problem)
    if obstacle is not None:
        return tiled_backward.gradients, f"torch, panel by panel; not {backend}: {obstacle}"
    return own.gradients, backend
