"""Odd arguments for a public function, beside those that its example gives: refused in words, or taken.

`with_odd(test, call)` puts them behind the example's own call, where whatever the example made is at hand.
"""

import ast
import contextlib
import doctest
import inspect
import io
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from lens.common.errors import LensError

ODD = (object(), [object()], {"a": object()}, "a text", float("nan"), 10**400)


class Working(BaseException):
    """A model was run: what the function was given it took."""


def with_odd(test: doctest.DocTest, call: Any, raw: list[str]) -> None:
    """Behind the first call of `call` in the test, others with odd arguments; what is raw is put into the list."""
    name = call.__name__

    def try_odd(*args: Any, **named: Any) -> None:
        raw.extend(_raw(call, args, named))

    for place, example in enumerate(test.examples, 1):
        for node in _calls(ast.parse(example.source)):
            if name in (getattr(node.func, "attr", None), getattr(node.func, "id", None)):
                node.func = ast.Name("try_odd_", ast.Load())
                test.globs["try_odd_"] = try_odd
                source = ast.unparse(ast.fix_missing_locations(node)) + "\n"
                test.examples.insert(place, doctest.Example(source, "", lineno=example.lineno))
                return


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls whose arguments are names of the example's own, not those of a function or a loop in it."""
    if isinstance(node, ast.Call):
        yield node
    inner = (ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for child in () if isinstance(node, inner) else ast.iter_child_nodes(node):
        yield from _calls(child)


def _raw(call: Any, args: tuple[Any, ...], named: dict[str, Any]) -> list[str]:
    signature = inspect.signature(call)
    given = signature.bind(*args, **named).arguments
    found = []
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(torch.nn.Module, "__call__", _run),
    ):
        for name, one in signature.parameters.items():
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                continue
            for odd in ODD:
                changed = inspect.BoundArguments(
                    signature,
                    {  # type: ignore[arg-type]
                        each: odd if each == name else given[each]
                        for each in signature.parameters
                        if each == name or each in given
                    },
                )
                if problem := _problem(call, changed):
                    found.append(f"{call.__name__}({name}={odd!r:.20}): {problem}")
    return found


def _run(*_: Any, **__: Any) -> None:
    raise Working


def _problem(call: Any, given: inspect.BoundArguments) -> str:
    try:
        call(*given.args, **given.kwargs)
    except (LensError, Working):
        return ""
    except Exception as error:
        return "" if _is_meant(error) else f"{type(error).__name__}: {error}"
    return ""


def _is_meant(error: Exception) -> bool:
    """Whether `lens_kernels`, which knows no other error, raised it itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_plain = isinstance(error, TypeError | ValueError) and "lens_kernels" in last.filename
    return is_plain and str(last.line).startswith("raise")
