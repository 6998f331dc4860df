"""The form of a new analysis, made from the same fields as flags and TOML."""

from typing import Any

from lens_analyses.config import CONFIGS, Setting, settings_of

_FIRST = (
    "what",
    "model.name",
    "prompts.text_name",
    "prompts.tokens",
    "prompts.windows",
    "prompts.copied",
)

_OF_FILES = ("vision",)
"""Analyses that read nothing but files."""


def form(files: bool = False) -> list[dict[str, Any]]:
    """One entry a setting, the most used first; `files`: those too that name a file of this machine.

    `name` (dotted), `kind` (`text`, `integer`, `boolean`, `choice`), `default` (None: not set), `help`,
    `choices` (for `choice`; suggestions for `text`), `least` and `most` (of an integer), `whats` (analyses
    that it concerns), `start` (what the form begins with), `more` (rarely needed).
    """
    settings: dict[str, Setting] = {}
    whats: dict[str, list[str]] = {}
    for what, config in CONFIGS.items():
        if what in _OF_FILES and not files:
            continue
        for one in settings_of(config):
            if not one.shown.internal and (files or not one.shown.file):
                settings.setdefault(one.name, one)
                whats.setdefault(one.name, []).append(what)
    ordered = dict.fromkeys((*_FIRST, *settings))
    return [_entry(settings[name], whats[name]) for name in ordered]


def _entry(one: Setting, whats: list[str]) -> dict[str, Any]:
    choices = whats if one.name == "what" else one.choices or tuple(one.shown.suggestions())
    return {
        "name": one.name,
        "kind": one.kind,
        "default": one.default,
        "help": one.help,
        "choices": list(choices),
        "least": one.least,
        "most": one.most,
        "whats": whats,
        "start": one.default if one.kind == "choice" else one.shown.start,
        "more": one.shown.rare,
    }
