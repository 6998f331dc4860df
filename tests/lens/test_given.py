"""Whatever takes a task, a circuit, scores or traces refuses something else in one line, before it runs."""

import importlib
import inspect
from types import ModuleType

import pytest

import lens
from lens.common.given import given_as, given_traces

ROOMS = ("heads", "circuits", "sinks", "edits", "policies", "vision", "tasks", "runs")
KINDS = {"task": "Task", "circuit": "Circuit", "scores": "EdgeScores", "trace": "AttentionTrace"}
KINDS |= {"traces": "AttentionTrace"}
PLAIN = {"heads": ["L0H0"], "onto": ["first"], "tokens": ["a"], "path": "never-written", "key": 0}


def functions():
    """name -> every advertised function that takes one of `KINDS`, in the rooms and the rooms in them."""
    rooms = [importlib.import_module(f"lens.{room}") for room in ROOMS]
    found = {"lens.profile": lens.profile}
    for room in rooms:
        for name in dir(room):
            thing = getattr(room, name)
            if isinstance(thing, ModuleType) and thing.__name__.startswith(room.__name__):
                if hasattr(thing, "__path__"):
                    rooms.append(thing)
            elif inspect.isfunction(thing) and set(inspect.signature(thing).parameters) & set(
                KINDS
            ):
                found[f"{room.__name__}.{name}"] = thing
    return found


FUNCTIONS = functions()


def cases():
    for name, function in FUNCTIONS.items():
        parameters = inspect.signature(function).parameters
        required = [one for one, p in parameters.items() if p.default is p.empty]
        for one in parameters:
            if one in KINDS and one in required and KINDS[one] in str(parameters[one].annotation):
                yield pytest.param(function, required, one, id=f"{name}-{one}")


@pytest.fixture(scope="module")
def right():
    """One of each kind, and a model that must not run."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, n=4)
    found = lens.circuits.find(model, task, edges=10, progress=False)
    trace = lens.capture(model, task.clean[0], keep_qk=True, progress=False)
    made = {"model": model, "task": task, "circuit": found.circuit, "scores": found.scores}
    return made | {"trace": trace, "traces": [trace]}


@pytest.mark.parametrize(("function", "required", "wrong"), [*cases()])
def test_something_else_is_refused_by_name(right, function, required, wrong):
    arguments = {one: right.get(one, PLAIN.get(one)) for one in required} | {wrong: "x"}
    with pytest.raises(lens.LensError, match=rf"{wrong} must be an? {KINDS[wrong]} .*got 'x'"):
        function(**arguments)


def test_enough_functions_were_tried():
    assert {"lens.circuits.find", "lens.circuits.evaluate", "lens.sinks.rate"} <= set(FUNCTIONS)
    assert len([*cases()]) >= 25


def test_what_find_returns_stands_for_its_circuit_and_its_scores(right):
    model, task = right["model"], right["task"]
    found = lens.circuits.find(model, task, edges=10, progress=False)
    by_parts = lens.circuits.evaluate(model, task, found.scores, draws=1, progress=False)
    whole = lens.circuits.evaluate(model, task, found, draws=1, progress=False)
    assert whole.table().equals(by_parts.table())
    assert given_as("Circuit", circuit=found) is found.circuit
    run = lens.circuits.run_circuit(model, task, found, progress=False)
    alone = lens.circuits.run_circuit(model, task, found.circuit, progress=False)
    assert (run.metric == alone.metric).all()


def test_no_trace_is_refused():
    with pytest.raises(lens.LensError, match="at least one trace, got an empty list"):
        given_traces([])
