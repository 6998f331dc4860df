"""From TOML, assignments and flags to a checked configuration, or to one line that says what is wrong."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lens.common.checked import checked
from lens.common.errors import LensError
from lens.common.files import read_text, shorten
from lens.runs.commands import task_of
from lens_analyses.config.models import CONFIGS, RunConfig
from lens_analyses.config.paths import local
from lens_analyses.config.prompts import SOURCES
from lens_analyses.config.settings import settings_of
from lens_analyses.console import UsageError

_FILE = ("configuration file", "each run folder has one, config.toml")
_LARGEST = 1 << 20  # bytes of a configuration
_COMMANDS = {what: "lens run" if what == "profile" else f"lens {what}" for what in CONFIGS}


@checked
def make_config(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with `values` (nested, as in TOML) in place of the defaults.

    Raises:
        UsageError: unknown name, wrong type, a value out of range, or values that do not go together.

    Example:
        >>> make_config({"what": "circuit", "analysis": {"n": 8}}).analysis.n
        8
    """
    what = values.get("what", "profile")
    if not isinstance(what, str) or what not in CONFIGS:
        raise UsageError(f"what must be one of {', '.join(CONFIGS)}, got {what!r}")
    try:
        return CONFIGS[what].model_validate(_own(what, values))
    except ValidationError as error:
        problems = dict.fromkeys(_explain(CONFIGS[what], problem) for problem in error.errors())
        raise UsageError("; ".join(problems)) from None


@checked
def load_config(
    path: Path | None, overrides: Mapping[str, Any], flags: Mapping[str, str] | None = None
) -> RunConfig:
    """From a TOML file with dotted overrides (`{"prompts.tokens": 128}`) on top.

    Args:
        path: of the file; None: the defaults.
        overrides: dotted name -> value.
        flags: dotted name -> what the setting was called by who gave it, for errors.

    Raises:
        UsageError: the file is missing or no TOML, and as `make_config`.

    Example:
        >>> load_config(None, {"prompts.tokens": 64}).prompts.tokens
        64
    """
    values: dict[str, Any] = {} if path is None else read_toml(Path(path), *_FILE)
    _leave_others(values, overrides.get("what"))
    if any(f"prompts.{name}" in overrides for name in SOURCES):
        for name in (*SOURCES, "sha256"):  # another text replaces the file's
            if isinstance(values.get("prompts"), dict):
                values["prompts"].pop(name, None)
    for dotted, value in overrides.items():
        *sections, last = dotted.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UsageError(f"{dotted}: {section} is a value, not a section")
        table[last] = value
    try:
        return make_config(values)
    except UsageError as error:
        raise UsageError(_renamed(str(error), flags or {})) from None


@checked
def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["prompts.tokens=128"]` to `{"prompts.tokens": 128}`; values are TOML, bare words are strings.

    Raises:
        UsageError: no `=`, or no name before it.

    Example:
        >>> parse_assignments(["prompts.tokens=128", "what=sinks"])
        {'prompts.tokens': 128, 'what': 'sinks'}
    """
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise UsageError(
                f"--set takes name=value, got {assignment!r}; e.g. --set prompts.tokens=128"
            )
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):  # no TOML, or more than Python reads
            found[name.strip()] = value
    return found


def read_toml(path: Path, kind: str, hint: str) -> dict[str, Any]:
    """The values of a TOML file.

    Args:
        path: of the file.
        kind: what it is, for errors.
        hint: what to say where it is not there.

    Raises:
        UsageError: it is missing, no TOML, or larger than any that a person writes.
    """
    try:
        if not local(path).exists():
            raise UsageError(f"no {kind} {path}; {hint}")
        return tomllib.loads(read_text(path, most=_LARGEST))
    except UsageError:
        raise
    except (LensError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the {kind} {path}: {error}") from None


def _leave_others(values: dict[str, Any], what: Any) -> None:
    """Of the run of another analysis, only its task is this one's: their settings differ, also those of one name."""
    if what is not None and values.get("what", what) != what and "analysis" in values:
        task = task_of(values, what)
        values["analysis"] = {} if task is None else {"task": task}


def _own(what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the settings of other commands that say what those would do anyway.

    Raises:
        UsageError: a setting of another command with another value than its default.
    """
    given = values.get("analysis")
    if not isinstance(given, Mapping) or what == "profile":
        return dict(values)
    own, kept = _analysis_of(what), {}
    for name, value in given.items():
        others = {other: _analysis_of(other) for other in CONFIGS if other != what}
        owners = [other for other, theirs in others.items() if name in theirs]
        if name in own or not owners:
            kept[name] = value
        elif value != others[owners[0]][name]:
            commands = " and ".join(_COMMANDS[owner] for owner in owners)
            raise UsageError(
                f"analysis.{name} is a setting of {commands}, and {_COMMANDS[what]} does not read it"
            )
    return {**values, "analysis": kept}


def _analysis_of(what: str) -> dict[str, Any]:
    """Name -> default of the settings of an analysis."""
    found = {one.name: one.default for one in settings_of(CONFIGS[what])}
    return {
        name.partition(".")[2]: default
        for name, default in found.items()
        if name.startswith("analysis.")
    }


def _explain(model: type[RunConfig], problem: Any) -> str:
    """One line for one error of pydantic: which setting, what was expected, what came."""
    parts = [str(part) for part in problem["loc"]]
    dotted, value, kind = ".".join(parts), problem["input"], problem["type"]
    settings = {one.name: one for one in settings_of(model)}
    if kind == "value_error":
        said = str(problem["ctx"]["error"])
        return f"{dotted} {said}" if said.startswith(("must ", "has ", "names ", "'")) else said
    if kind == "extra_forbidden":
        return _unknown(dotted, settings)
    if dotted not in settings:
        return f"{dotted} is a section, got the value {shorten(repr(value))}"
    one = settings[dotted]
    if kind == "string_too_short":
        return f"{dotted} must not be empty"
    expected = one.expected
    if kind in ("greater_than_equal", "less_than_equal"):
        expected = one.bounds.removeprefix("of ")
    return f"{dotted} must be {expected}, got {shorten(repr(value))}"


def _unknown(dotted: str, settings: Iterable[str]) -> str:
    section, dot, name = dotted.rpartition(".")
    prefix = f"{section}{dot}"
    inside = [one.removeprefix(prefix) for one in settings if one.startswith(prefix)]
    known = list(dict.fromkeys(one.partition(".")[0] for one in inside))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown setting {shorten(dotted)}; {hint}"


def _renamed(message: str, flags: Mapping[str, str]) -> str:
    """The message with the settings called as they were given; what is quoted is a value."""
    for dotted, flag in flags.items():
        message = re.sub(rf"(?<![\w.'\"-]){re.escape(dotted)}(?![\w.])", flag, message)
    return message
