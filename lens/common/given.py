"""What a function was given in place of a task, a trace, a circuit: refused in one line, before any work."""

from __future__ import annotations

from typing import Any

from lens.common.choices import shown
from lens.common.errors import LensError

MADE_BY = {
    "LoadedModel": "lens.load(it) makes one",
    "Task": "lens.tasks.induction(model) makes one",
    "AttentionTrace": "lens.capture(model, prompt) makes one",
    "Circuit": "lens.circuits.find(model, task) makes one",
    "EdgeScores": "lens.circuits.score_edges(model, task) makes one, and lens.circuits.find(model, task) holds one",
    "HeadScores": "lens.heads.importance(model, task) makes them",
    "PruningCurve": "lens.heads.pruning.curve(model, task, order=scores) makes one",
    "Agreement": "lens.heads.agreement(scores, others) makes one",
    "Effect": "lens.effect(model, prompts, edit) makes one",
    "Segments": "lens.vision.segments(model, inputs) makes them",
    "Graph": "lens.circuits.score_edges(model, task).graph is one",
    "Ablation": "lens.circuits.score_edges(model, task).ablation is one",
    "PositionScores": "lens.circuits.scores.positions(model, task) makes them",
    "Tensor": "torch.tensor(numbers) makes one",
    "Overlay": "trace.overlay() makes one",
    "Trial": "lens.tasks.needles.text makes some",
    "Run": "lens.runs.open_run(folder) reads one",
}
_FOUND, _PART = "FoundCircuit", {"Circuit": "circuit", "EdgeScores": "scores"}


def given_as(kind: str, **value: Any) -> Any:
    """The one argument that is named, which must be of a class of this name.

    What `lens.circuits.find` returns stands for its circuit or its scores. The class is known by its
    name, so that a module that only checks need not import it.

    Raises:
        LensError: `task must be a Task (lens.tasks.induction(model) makes one), got 'text'`

    Example:
        >>> given_as("Task", task=task) is task
        True
    """
    ((name, found),) = value.items()
    if not is_of(kind, found):
        raise LensError(f"{name} must be {described(kind)}, got {shown(found)}")
    return (
        getattr(found, _PART[kind]) if type(found).__name__ == _FOUND and kind in _PART else found
    )


def not_loaded(name: str, value: Any) -> LensError:
    """What to say of a model that is none; the line says how it becomes one."""
    what = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
    how = f"lens.load({value!r})" if isinstance(value, str) else "lens.load(it)"
    return LensError(f"{name} must be what lens.load returns, got {what}; pass {how}")


def described(kind: str) -> str:
    """`a Task (lens.tasks.induction(model) makes one)`: a class, with who makes it where that is known."""
    how = f" ({MADE_BY[kind]})" if kind in MADE_BY else ""
    return f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}{how}"


def is_of(kind: str, value: Any) -> bool:
    """Whether a value is of a class of this name, or is what `lens.circuits.find` returns and has one."""
    names = {one.__name__ for one in type(value).__mro__}
    return kind in names or (_FOUND in names and kind in _PART)


def given_traces(traces: Any) -> list[Any]:
    """One trace or several, as a list.

    Raises:
        LensError: none, or something else among them.
    """
    several = list(traces) if isinstance(traces, list | tuple) else [traces]
    if not several:
        raise LensError(
            f"expected at least one trace, got an empty list; {MADE_BY['AttentionTrace']}"
        )
    return [given_as("AttentionTrace", traces=trace) for trace in several]


def given_table(table: Any, *columns: str) -> None:
    """Refuse what is no table, or lacks columns.

    Raises:
        LensError: `expected a table with the columns layer, head, got 'text'`
    """
    if type(table).__name__ != "DataFrame" or not all(one in [*table.columns] for one in columns):
        got = (
            f"the columns {', '.join(map(str, table.columns))}"
            if hasattr(table, "columns")
            else shown(table)
        )
        raise LensError(
            f"expected a table with the columns {', '.join(map(str, columns))}, got {got}"
        )
