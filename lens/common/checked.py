"""No public function takes an argument of another kind than its signature names, or fails with an error of Python's.

A room hands its functions out so (`lens.common.lazy`). Models, tasks and other classes that one function makes,
the words of a `Literal`, whole numbers from a least one (`Count`, `Seed`), numbers and truth values are looked at
before the function works, which says itself which of the last two make sense. What it says of lists, texts and
other classes it says better; where it did not look, the error that comes of it is told as what it is.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import os
import sys
import types
import typing
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from lens.common.choices import check_choice, check_counts, is_whole, shown, whole_of
from lens.common.errors import LensError
from lens.common.given import MADE_BY, described, is_of, not_loaded
from lens.common.isolation import on_cpu, owned

_Public = TypeVar("_Public")
_ARRAYS = ("Float", "Int", "Bool", "Shaped", "Real")  # of jaxtyping: the array's class stands first
_MOST = 100  # elements of a list that are looked at
_BITS = 2**63  # a whole number from here on fails wherever it is used
_LIMITED = (typing.Literal, typing.Annotated)


def checked(call: _Public) -> _Public:
    """The function or the class of records, refusing arguments of another kind than its signature names.

    A record looks whenever one is made, from now on; what is neither is given back as it is.

    Raises:
        LensError: `draws must be an integer, got 'many'`

    Example:
        >>> checked(2.5)
        2.5
    """
    given: Any = call
    if isinstance(given, types.FunctionType):
        return _function(given)
    if isinstance(given, type) and dataclasses.is_dataclass(given):
        _look_whenever_made(given)
    return call


def _look_whenever_made(record: Any) -> None:
    if not hasattr(record.__init__, "__wrapped__"):
        names = ChainMap(*(vars(sys.modules[one.__module__]) for one in record.__mro__))
        record.__init__ = _looking(record.__init__, names)


@functools.cache
def _function(call: types.FunctionType) -> Any:
    return _looking(call, inspect.unwrap(call).__globals__)


def _looking(call: Any, names: Mapping[str, Any]) -> Any:
    signature = inspect.signature(call)
    kinds = {
        one.name: _kinds(one.annotation, names)
        for one in signature.parameters.values()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    defaults = {one.name: one.default for one in signature.parameters.values()}
    plain = {name: one for name, one in kinds.items() if one and all(map(_is_plain, one))}

    @functools.wraps(call)
    def calls(*args: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*args, **named).arguments
        except TypeError as error:
            raise TypeError(f"{call.__name__}() {_taken(signature)}: {error}") from None
        given = {n: value for n, value in given.items() if value is not defaults[n]}
        for name, value in given.items():
            _check(name, value, plain.get(name, ()))
        try:
            with ExitStack() as stack:
                stack.enter_context(on_cpu())
                for name, value in given.items():
                    if "LoadedModel" in plain.get(name, ()) and value is not None:
                        stack.enter_context(owned(value.module))
                return call(*args, **named)
        except LensError:
            raise
        except Exception as error:
            for name, value in given.items():
                _check(name, value, kinds.get(name, ()), error)
            raise

    return calls


def _taken(signature: inspect.Signature) -> str:
    """Which arguments there are, in an error."""
    shown = [one for one in signature.parameters.values() if one.name != "self"]
    placed = [one.name for one in shown if one.kind != one.KEYWORD_ONLY]
    named = [one.name for one in shown if one.kind == one.KEYWORD_ONLY]
    by_name = f"{' and ' if placed else ''}by name {', '.join(named)}" if named else ""
    return f"takes {', '.join(placed)}{by_name}" if shown else "takes no arguments"


def _is_plain(kind: Any) -> bool:
    """Whether it is a number, a truth value, a text, None, or a class that one function makes."""
    if isinstance(kind, str):
        return kind in MADE_BY
    return kind in (int, float, bool, str, types.NoneType) or typing.get_origin(kind) in _LIMITED


def _check(name: str, value: Any, kinds: tuple[Any, ...], error: Exception | None = None) -> None:
    if _fits_any(value, kinds):
        least = [typing.get_args(kind)[1] for kind in kinds if _is_limited(kind)]
        if least and is_whole(value):
            check_counts(least[0], **{name: value})
        return
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if kinds == ("LoadedModel",):
        raise not_loaded(name, value) from error
    if isinstance(value, int) and abs(value) >= _BITS and any(map(_is_of_numbers, kinds)):
        raise LensError(f"{name} must fit in 64 bits, got {shown(value)}") from error
    if all(typing.get_origin(kind) is typing.Literal for kind in kinds):
        check_choice(name, value, [word for kind in kinds for word in typing.get_args(kind)])
    several = isinstance(value, list | tuple)
    said = dict.fromkeys(_said(kind, several) for kind in kinds)
    raise LensError(f"{name} must be {' or '.join(said)}, got {shown(value)}") from error


def _kinds(annotation: Any, names: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an annotation allows: types, generic ones, and classes by name; nothing where it allows all."""
    found = [*_parts(annotation, names)]
    return () if Any in found else tuple(found)


def _parts(part: Any, names: Mapping[str, Any]) -> Iterator[Any]:
    if isinstance(part, str):
        part = ast.parse(part, mode="eval").body
    if isinstance(part, ast.Subscript) and getattr(part.value, "id", "") in _ARRAYS:
        assert isinstance(part.slice, ast.Tuple)
        part = part.slice.elts[0]
    if isinstance(part, ast.BinOp):
        yield from _parts(part.left, names)
        yield from _parts(part.right, names)
    elif isinstance(part, ast.expr):
        yield from _of_value(part, names)
    elif typing.get_origin(part) in (typing.Union, types.UnionType):
        for one in typing.get_args(part):
            yield from _parts(one, names)
    elif part is None or part in _PLAIN or typing.get_origin(part):
        yield types.NoneType if part is None else part
    elif not isinstance(part, type) or part in _ALL or getattr(part, "_is_protocol", False):
        yield Any
    else:
        yield part.__name__


def _of_value(part: ast.expr, names: Mapping[str, Any]) -> Iterator[Any]:
    """Of an expression; a class that is imported for type checkers alone is known by its name."""
    try:
        value = eval(compile(ast.Expression(part), "", "eval"), dict(names))
    except (NameError, AttributeError):
        name = ast.unparse(part).rpartition(".")[2]
        yield name if name in MADE_BY else Any
    else:
        yield from _parts(value, names)


def _fits_any(value: Any, kinds: tuple[Any, ...]) -> bool:
    return not kinds or any(_fits(value, kind) for kind in kinds)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, str):
        return is_of(kind, value)
    if kind in _PLAIN:
        return _PLAIN[kind][1](value)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str | int) and value in inner
    if origin is typing.Annotated:
        return is_whole(value) and inner[1] <= value < _BITS
    if origin is Callable:
        return callable(value)
    if not isinstance(origin, type) or not issubclass(origin, Iterable):
        return True
    if issubclass(origin, Mapping):
        several = [*value.values()][:_MOST] if isinstance(value, dict) and inner else ()
        return hasattr(value, "keys") and all(
            _fits_any(one, _kinds(inner[1], {})) for one in several
        )
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        return False
    several = value[:_MOST] if isinstance(value, list | tuple) else ()
    return all(_fits_any(one, part) for one, part in zip(several, _each(inner), strict=False))


def _each(inner: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The kinds of one element after another."""
    if Ellipsis not in inner and len(inner) > 1:
        yield from (_kinds(part, {}) for part in inner)
    else:
        kinds = _kinds(inner[0], {}) if inner else ()
        yield from itertools.repeat(kinds)


def _said(kind: Any, several: bool) -> str:
    """In an error; of a list that has something else in it also what it should have."""
    if isinstance(kind, str):
        return described(kind)
    if kind in _PLAIN:
        return _PLAIN[kind][0]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is typing.Annotated:
        return whole_of(inner[1])
    if origin is Callable:
        return "a function"
    if issubclass(origin, Mapping):
        return "a mapping"
    of = [one for one in _kinds(inner[0], {}) if isinstance(one, str)] if several and inner else []
    return f"a list, each {' or '.join(map(described, of))}" if of else "a list"


def _is_of_numbers(kind: Any) -> bool:
    return kind in (int, float) or _is_limited(kind)


def _is_limited(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Annotated


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < _BITS
    return hasattr(type(value), "__float__") or hasattr(type(value), "__index__")


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", _is_number),
    float: ("a number", _is_number),
    bool: ("True or False", _is_number),
    str: ("a text", lambda value: isinstance(value, str)),
    Path: ("a path", lambda value: isinstance(value, str | os.PathLike)),
    types.NoneType: ("None", lambda value: value is None),
}
_ALL = (Any, object, inspect.Parameter.empty)
