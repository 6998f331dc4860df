"""Arguments that are one of a few words, or a whole number: one check, and one message, for all of them."""

import difflib
import reprlib
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any, TypeAlias, TypeVar

from lens.common.errors import LensError

Count: TypeAlias = Annotated[int, 1]
"""A whole number of at least 1: in a signature `lens.common.checked` looks."""
Seed: TypeAlias = Annotated[int, 0]
"""A whole number of at least 0, likewise."""
_Choice = TypeVar("_Choice")
_REPEATED = frozenset(
    (
        "candidates",
        "controls",
        "draws",
        "epochs",
        "n",
        "resamples",
        "rounds",
        "runs",
        "seeds",
        "steps",
    )
)
_MOST = 1_000_000
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 80


def check_choice(name: str, value: _Choice, choices: Any) -> _Choice:
    """`value`, if it is one of the choices.

    Args:
        name: of the argument.
        value: what was given.
        choices: a `Literal`, or the words themselves.

    Raises:
        LensError: `rule must be one of 'mask', 'drop', got 'masc'; did you mean 'mask'?`

    Example:
        >>> check_choice("rule", "mask", ("mask", "drop"))
        'mask'
    """
    known = words(choices)
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value), known, 1)
    raise LensError(
        f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def check_counts(least: int = 1, **numbers: Any) -> None:
    """Refuse what is no whole number of at least `least`, and what would be done more than a million times.

    Args:
        least: 0, or what makes sense.
        numbers: arguments by name; those that say how often something is done (draws, steps, ...) have the bound.

    Raises:
        LensError: `draws must be a positive integer, got 0`; `draws must be at most 1,000,000, got 1000000000`

    Example:
        >>> check_counts(draws=20, resamples=5)
    """
    for name, value in numbers.items():
        if not is_whole(value) or value < least:
            raise LensError(f"{name} must be {whole_of(least)}, got {shown(value)}")
        if name.partition(" of ")[0] in _REPEATED and value > _MOST:
            raise LensError(f"{name} must be at most {_MOST:,}, got {shown(value)}")


def whole_of(least: int) -> str:
    """`a positive integer`, `an integer of at least 0`."""
    return "a positive integer" if least == 1 else f"an integer of at least {least}"


def shown(value: Any) -> str:
    """A value in an error, which is one line whatever was given: a number, a text, a list; of others the class."""
    if not isinstance(value, str | bytes | Real | list | tuple | dict | None):
        return type(value).__name__
    try:
        return " ".join(_shown.repr(value).split())
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of Python or of numpy; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_range(name: str, asked: Any, length: int) -> tuple[int, int]:
    """(first, past the last) of positions within 0 to `length`.

    Raises:
        LensError: `keys must be a range within 0..8, got (0, 9)`
    """
    row = isinstance(asked, tuple | list) or len(getattr(asked, "shape", ())) == 1
    ends = [*asked] if row else []
    if len(ends) != 2 or not all(map(is_whole, ends)) or not 0 <= ends[0] < ends[1] <= length:
        got = repr(asked) if isinstance(asked, slice | range) else shown(asked)
        how = "" if len(ends) == 2 else "; write (first, past the last)"
        raise LensError(f"{name} must be a range within 0..{length}, got {got}{how}")
    return int(ends[0]), int(ends[1])


def check_lists(**lists: Any) -> None:
    """Refuse what is no list, and a text, which would be read letter by letter.

    Raises:
        LensError: `parts must be a list, got 'L0H1'`

    Example:
        >>> check_lists(parts=["L0H1"], sizes=(0.5, 1.0))
    """
    for name, value in lists.items():
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            raise LensError(f"{name} must be a list, got {shown(value)}")


def check_mapping(**given: Any) -> None:
    """Refuse what does not map names to something.

    Raises:
        LensError: `conditions must map names to something, got [1]`

    Example:
        >>> check_mapping(conditions={"clean": [1], "corrupt": [2]})
    """
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise LensError(f"{name} must map names to something, got {shown(value)}")


def check_between(least: float, most: float, **lists: Any) -> None:
    """Refuse what is no list of at least one number between `least` and `most`, both left out.

    Raises:
        LensError: `shares must lie between 0 and 1, got (1.5,)`

    Example:
        >>> check_between(0, 1, shares=(0.1, 0.5))
    """
    check_lists(**lists)
    what = "be positive numbers" if most == float("inf") else f"lie between {least} and {most}"
    for name, values in lists.items():
        given = tuple(values)
        if not given or not all(is_number(one) and least < one < most for one in given):
            raise LensError(f"{name} must {what}, got {shown(given)}")


def is_number(value: Any) -> bool:
    """Whether it is a number, of Python or of numpy; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def words(choices: Any) -> tuple[str, ...]:
    """The words of a `Literal`, or of any collection of them."""
    if typing.get_origin(choices) is typing.Literal:
        return typing.get_args(choices)
    assert isinstance(choices, Iterable)
    return tuple(choices)
