"""Commands that make a run: `lens run`, `lens heads` and their likes, from the fields of their configurations.

Each command has a flag for every setting of its configuration, and the same flags around them; `--config`
reads them from a file, `--set` takes them by their dotted names.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_analyses.config import (
    CONFIGS,
    RunConfig,
    Setting,
    load_config,
    parse_assignments,
    settings_of,
)
from lens_analyses.config.prompts import OF_LABELS, SOURCES
from lens_analyses.console import PARTIAL, Output, UsageError, log
from lens_analyses.options import (
    RUNS,
    Again,
    Assignments,
    Config,
    Debug,
    DryRun,
    Json,
    Out,
    Quiet,
)

_AROUND: dict[str, tuple[Any, Any]] = {
    "config": (Config, None),
    "assignments": (Assignments, None),
    "out": (Out, RUNS),
    "again": (Again, False),
    "dry_run": (DryRun, False),
    "json": (Json, False),
    "quiet": (Quiet, False),
    "debug": (Debug, False),
}
"""Flags of every command of this module: name of the parameter -> its type and default."""
_SHORT = {"--model": "-m"}
_DEFAULT_TEXT = {"prompts.text_name": "moby-dick", "prompts.tokens": 128, "prompts.windows": 4}
_WITHOUT_TEXT = (
    "circuit",
    "explain",
    "patch",
    "vision",
)  # a task is enough, copied prompts are profiled; or pictures
_NO_FLAG = ("what",)  # the command itself says it


def flags_of(verb: str) -> list[Setting]:
    """The settings that a command has flags for."""
    found = settings_of(CONFIGS["profile" if verb == "run" else verb])
    return [one for one in found if not one.shown.internal and one.name not in _NO_FLAG]


def run_command(verb: str) -> Callable[..., None]:
    """The function of a command, `run` or an analysis, for typer: its signature has one parameter a flag."""
    flags = {_parameter(one): one for one in flags_of(verb)}

    def command(**given: Any) -> None:
        output = Output(given["json"], given["quiet"], given["debug"])
        with output.session():
            named = {name: one for name, one in flags.items() if given[name] is not None}
            values = {one.name: _value(one, given[name]) for name, one in named.items()}
            if verb != "run":
                values["what"] = verb
            values = {**parse_assignments(given["assignments"] or []), **values}
            if verb not in _WITHOUT_TEXT:
                values = _with_text(verb, given["config"], values)
            names = {one.name: one.flag for one in named.values()}
            settings = load_config(given["config"], values, names)
            if given["dry_run"]:
                from lens_analyses.estimate import estimate

                forecast = estimate(settings)
                output.result(forecast.text(), forecast.as_json())
                return
            execute(settings, given["out"], output, given["again"])

    parameters = {name: (_type(one), None) for name, one in flags.items()} | _AROUND
    command.__name__ = verb
    command.__annotations__ = {name: kind for name, (kind, _) in parameters.items()}
    command.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
            for name, (kind, default) in parameters.items()
        ]
    )
    return command


def execute(settings: RunConfig, out: Path, output: Output, again: bool) -> None:
    """Make the run and say what came of it."""
    from lens_analyses import runner

    finished = runner.execute(settings, out, output, again=again)
    output.result(finished.text(), finished.as_json())
    if finished.status != "success":
        raise SystemExit(PARTIAL)


def _parameter(one: Setting) -> str:
    return one.flag.strip("-").replace("-", "_")


def _type(one: Setting) -> Any:
    """As typer reads it: words, which the configuration checks, or a switch; names, and help."""
    if one.kind == "boolean":
        switch = f"{one.flag}/--no-{one.flag[2:]}"
        return Annotated[bool | None, typer.Option(switch, help=_help(one))]
    names = [one.flag, *([_SHORT[one.flag]] if one.flag in _SHORT else [])]
    metavar = one.kind.upper() if one.kind == "integer" else "TEXT"
    return Annotated[str | None, typer.Option(*names, help=_help(one), metavar=metavar)]


def _help(one: Setting) -> str:
    choices = f" One of {', '.join(one.choices)}." if one.choices else ""
    return one.help + choices + ("" if one.default is None else f" [{one.default}]")


def _value(one: Setting, given: Any) -> Any:
    return one.parse(given) if isinstance(given, str) else given


def _with_text(verb: str, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """What was given, and where no prompts were named some of an embedded text, which is said.

    Raises:
        UsageError: nothing that the model should write on.
    """
    named = [f"prompts.{name}" for name in (*SOURCES, *OF_LABELS, "copied")]
    if config is not None or any(name in given for name in named):
        return given
    if verb == "generate":
        raise UsageError(
            "which text? --prompt WORDS, --text FILE, --text-name moby-dick or --prompts FILE"
        )
    values = _DEFAULT_TEXT | given
    log.info(
        "no text was named: %s prompts of %s tokens of %s; others by --text FILE, --prompt WORDS, --prompts FILE",
        *(values[name] for name in ("prompts.windows", "prompts.tokens", "prompts.text_name")),
    )
    return values
