"""Arguments that are one of a few words, or a whole number: one check, and one message, for all of them."""

import difflib
import typing
from collections.abc import Iterable
from numbers import Integral
from typing import Any, TypeVar

from lens.common.errors import LensError

_Choice = TypeVar("_Choice")


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
        f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def check_counts(least: int = 1, **numbers: Any) -> None:
    """Refuse what is no whole number of at least `least`.

    Args:
        least: 0, or what makes sense.
        numbers: arguments by name.

    Raises:
        LensError: `draws must be a positive integer, got 0`

    Example:
        >>> check_counts(draws=20, resamples=5)
    """
    what = "a positive integer" if least == 1 else f"an integer of at least {least}"
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise LensError(f"{name} must be {what}, got {value!r}")


def words(choices: Any) -> tuple[str, ...]:
    """The words of a `Literal`, or of any collection of them."""
    if typing.get_origin(choices) is typing.Literal:
        return typing.get_args(choices)
    assert isinstance(choices, Iterable)
    return tuple(choices)
