"""Whatever takes a task, a circuit, scores or traces refuses something else in one line, before it runs."""

import contextlib
import importlib
import inspect
import typing
from types import ModuleType
from typing import Literal, get_args, get_origin

import pytest

import lens
from lens.common.given import given_as, given_traces
from tests.lens.test_results import functions as public

ROOMS = ("heads", "circuits", "sinks", "edits", "policies", "vision", "tasks", "runs")
KINDS = {"task": "Task", "circuit": "Circuit", "scores": "EdgeScores", "trace": "AttentionTrace"}
KINDS |= {"traces": "AttentionTrace"}
OTHER = {("lens.circuits.checks.evaluate_positions", "scores"): "PositionScores"}
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
            kind = OTHER.get((name, one), KINDS.get(one))
            if kind and one in required and kind in str(parameters[one].annotation):
                yield pytest.param(function, required, one, kind, id=f"{name}-{one}")


@pytest.fixture(scope="module")
def right():
    """One of each kind, and a model that must not run."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, n=4)
    found = lens.circuits.find(model, task, edges=10, progress=False)
    trace = lens.capture(model, task.clean[0], keep_qk=True, progress=False)
    made = {"model": model, "task": task, "circuit": found.circuit, "scores": found.scores}
    return made | {"trace": trace, "traces": [trace]}


@pytest.mark.parametrize(("function", "required", "wrong", "kind"), [*cases()])
def test_something_else_is_refused_by_name(right, function, required, wrong, kind):
    arguments = {one: right.get(one, PLAIN.get(one)) for one in required} | {wrong: "x"}
    with pytest.raises(lens.LensError, match=rf"{wrong} must be an? {kind} .*got 'x'"):
        function(**arguments)


MORE = {
    "lens.circuits.discovery.learn_masks": {"penalty": 1.0},
    "lens.circuits.discovery.acdc": {"thresholds": [0.1]},
    "lens.circuits.scores.positions": {"spans": {"one": (1, 3)}},
    "lens.circuits.checks.stability": {"count": 3},
    "lens.circuits.reuse.overlap": {"first": ["L0H0"], "second": ["L0H1"]},
    "lens.heads.activity": {"domains": {"one": [[3, 4, 5]]}},
    "lens.reading.attribute": {"prompt": [3, 4, 5]},
}
"""What else these functions need before they can look at a word."""


def _is_word(annotation):
    return get_origin(annotation) is Literal or any(map(_is_word, get_args(annotation)))


def words():
    """(function, name of an argument that is one of a few words), of all public functions."""
    others = {name for name, _ in OTHER}
    for name, function in public(lens).items():
        if name in others:
            continue
        for one in inspect.signature(function).parameters.values():
            names = vars(typing) | inspect.unwrap(function).__globals__
            with contextlib.suppress(
                NameError, TypeError
            ):  # what is imported for types alone is no word
                if _is_word(eval(one.annotation, names)):
                    yield pytest.param(name, function, one.name, id=f"{name}-{one.name}")


@pytest.mark.parametrize(("name", "function", "word"), [*words()])
def test_a_word_that_is_none_of_the_choices_is_refused_before_anything_runs(
    right, name, function, word
):
    """In one form; a text is no list of words, and what takes other things too says so."""
    given = (
        right
        | PLAIN
        | {
            "prompts": [[3, 4, 5]] * 2,
            "prompt": [3, 4, 5],
            "edit": lens.edits.Mask(),
            "query": 1,
            "head": "L0H0",
        }
        | MORE.get(name, {})
    )
    parameters = inspect.signature(function).parameters
    arguments = {
        one: given[one] for one, p in parameters.items() if p.default is p.empty and one in given
    }
    missing = [
        one
        for one, p in parameters.items()
        if p.default is p.empty and one not in given and one != word
    ]
    if missing:
        pytest.skip(f"needs {missing}")
    with pytest.raises(lens.LensError, match=rf"{word}\b.* must be .*'zzz'"):
        function(**arguments | MORE.get(name, {}) | {word: "zzz"})


def test_enough_functions_were_tried():
    assert len([*words()]) > 40
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
