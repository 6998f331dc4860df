"""The form of a new analysis, made from the configuration's own types, defaults and docstrings."""

import dataclasses
import inspect
import re
import typing
from typing import Any

from lens.models.catalogue import DEFAULT_MODEL, KNOWN
from lens_analyses.config import SETTINGS_OF, WHATS, RunConfig

_HIDDEN = ("prompts.text", "prompts.batch", "prompts.sha256")  # files are named on the command line
_FIRST = (
    "what",
    "model.name",
    "prompts.text_name",
    "prompts.tokens",
    "prompts.windows",
    "prompts.copied",
)
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", re.MULTILINE)
_START = {
    "model.name": DEFAULT_MODEL,
    "prompts.text_name": "moby-dick",
    "prompts.tokens": 128,
    "prompts.windows": 4,
}
_KINDS = {int: "integer", bool: "boolean", str: "text"}


def form() -> list[dict[str, Any]]:
    """One entry a setting, the most used first.

    `name` (dotted), `kind` (`text`, `integer`, `boolean`, `choice`), `default` (None: not set), `help`,
    `choices` (for `choice`; suggestions for `text`), `whats` (analyses that it concerns), `start` (what
    the form begins with), `more` (rarely needed).
    """
    fields = list(_fields(RunConfig, ""))
    known = [name for name in _FIRST if any(field["name"] == name for field in fields)]
    order = {name: place for place, name in enumerate(known)}
    fields.sort(key=lambda field: order.get(field["name"], len(order)))
    return fields


def _fields(cls: Any, prefix: str) -> typing.Iterator[dict[str, Any]]:
    hints, texts = typing.get_type_hints(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, f"{name}.")
        elif name not in _HIDDEN:
            concerned = _concerned(name)
            kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind in _KINDS]
            yield {
                "name": name,
                "kind": "choice" if name == "what" else _KINDS[kinds[0]],
                "default": field.default,
                "help": texts.get(field.name, ""),
                "choices": _choices(name),
                "whats": concerned,
                "start": _START.get(name, field.default if name == "what" else None),
                "more": name not in _FIRST
                and not any(name in SETTINGS_OF[what] for what in WHATS[1:]),
            }


def _concerned(name: str) -> list[str]:
    """Analyses that read a setting."""
    if not name.startswith("analysis."):
        return list(WHATS)
    return [what for what in WHATS[1:] if name in SETTINGS_OF[what]] or list(WHATS[1:])


def _choices(name: str) -> list[str]:
    from lens.tasks import prompts

    found = {"what": WHATS, "model.name": KNOWN, "prompts.text_name": prompts.TEXTS}
    return list(found.get(name, ()))


def _docs(cls: Any) -> dict[str, str]:
    """Attribute -> its text in the docstring."""
    found = {}
    for names, text in _ENTRY.findall(inspect.getdoc(cls) or ""):
        found |= dict.fromkeys(names.split(", "), " ".join(text.replace("`", "").split()))
    return found
