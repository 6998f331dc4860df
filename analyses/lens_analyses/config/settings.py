"""One setting of a configuration, as its field describes it: for flags, for the form of a job and for errors."""

import types
import typing
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from lens.common.checked import checked
from lens.common.files import shorten

_LONGEST = 4096  # characters of a text: the longest path
_LARGEST = 2**53  # that every reader of JSON keeps
Kind = Literal["text", "integer", "boolean", "choice"]
_KINDS: dict[Any, Kind] = {str: "text", int: "integer", bool: "boolean"}
_EXPECTED = {
    "text": "text",
    "integer": "an integer",
    "boolean": "true or false",
}


@dataclass(frozen=True)
class Shown:
    """What a field says about itself beyond type, default, bounds and description.

    Attributes:
        flag: on the command line; made of the field's name if "".
        start: what the form of a new job begins with.
        rare: whether the form hides it among the settings that are rarely needed.
        file: names a file of this machine, which a form must not.
        several: names several of them, with commas.
        internal: written by the run itself; no flag, and not in the form.
        suggestions: values that are known, from which others are allowed too.
    """

    flag: str = ""
    start: Any = None
    rare: bool = False
    file: bool = False
    several: bool = False
    internal: bool = False
    suggestions: Callable[[], typing.Iterable[str]] = tuple


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted, e.g. `prompts.tokens`.
        kind: `text`, `integer`, `boolean` or `choice`.
        default: None: not set.
        help: one sentence.
        choices: all values of a `choice`.
        least, most: bounds of an integer.
        shown: see there.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    shown: Shown = field(default_factory=Shown)

    @property
    def flag(self) -> str:
        """On the command line, e.g. `--tokens`."""
        return self.shown.flag or f"--{self.name.rpartition('.')[2].replace('_', '-')}"

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}"
        return f"{_EXPECTED[self.kind]}{self.bounds and f' {self.bounds}'}"

    @property
    def bounds(self) -> str:
        """In words; "" without any."""
        if self.least is None:
            return ""
        return f"of at least {self.least}" + (f" and at most {self.most}" if self.most else "")

    def parse(self, text: str) -> Any:
        """A word of the command line as a value; what is no number stays a word, and is refused as one."""
        if self.kind == "integer":
            try:
                return int(text)
            except ValueError:
                return text
        return text


class Section(BaseModel):
    """A frozen group of settings; unknown names and values of another type are refused.

    So are text that no file can hold, and numbers that no other program reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        if isinstance(value, str) and len(value) > _LONGEST:
            raise ValueError(f"must be text of at most {_LONGEST:,} characters, got {len(value):,}")
        if isinstance(value, str) and not _is_written_as_it_is(value):
            raise ValueError(
                f"must be text without control characters such as line breaks, got {value!r}"
            )
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"must be at most {_LARGEST:,}, got {shorten(f'{value}')}")
        return value


def _is_written_as_it_is(text: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def setting(default: Any, text: str, *, shown: Shown | None = None, **bounds: Any) -> Any:
    """A field with a default, a description, and how it is shown."""
    return Field(default, description=text, json_schema_extra={"shown": shown or Shown()}, **bounds)  # pyright: ignore[reportArgumentType, reportCallIssue]


@checked
def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every setting of a configuration, those of its sections with their names before a dot.

    Example:
        >>> from lens_analyses.config.analyses import CircuitSettings
        >>> [setting.name for setting in settings_of(CircuitSettings)][-3:]
        ['edges', 'compare', 'spans']
    """
    for name, info in model.model_fields.items():
        inner = _alternatives(info.annotation)
        if isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
            if type(None) not in inner:
                yield from settings_of(inner[0], f"{prefix}{name}.")
        else:
            yield _setting(f"{prefix}{name}", info, inner[0])


def _setting(name: str, info: FieldInfo, hint: Any) -> Setting:
    extra = info.json_schema_extra
    bounds = {type(one): one for one in info.metadata}
    is_choice = typing.get_origin(hint) is Literal
    return Setting(
        name,
        kind="choice" if is_choice else _KINDS[hint],
        default=info.default,
        help=info.description or "",
        choices=typing.get_args(hint) if is_choice else (),
        least=bounds[Ge].ge if Ge in bounds else None,
        most=bounds[Le].le if Le in bounds else None,
        shown=typing.cast(Any, extra["shown"]) if isinstance(extra, dict) else Shown(),
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(one for part in typing.get_args(hint) for one in _alternatives(part))
    if typing.get_origin(hint) is Annotated:
        return _alternatives(typing.get_args(hint)[0])
    return (hint,)
