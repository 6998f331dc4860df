"""Commands that make a run: `lens run`, `lens heads` and their likes, from one table of settings.

Each command has a flag for every setting that `lens_analyses.config.SETTINGS_OF` gives it, and the same
flags around them; `--set` and `--config` reach all the others.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lens_analyses.config import SETTINGS_OF, flag_name
from lens_analyses.console import PARTIAL, Output, UsageError
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

if TYPE_CHECKING:
    from lens_analyses.config import RunConfig

_HELP = {
    "model.name": "Embedded name, folder or hub id.",
    "model.revision": "Of a hub model.",
    "model.dtype": "float32, float16 or bfloat16.",
    "model.device": "cpu, cuda or cuda:1. [cpu]",
    "prompts.text": "Text file to analyse.",
    "prompts.text_name": "Embedded text, e.g. moby-dick.",
    "prompts.batch": 'Batch: one prompt a line (.txt), or {"text": ...} a line (.jsonl).',
    "prompts.tokens": "Take the first N tokens of each text (all of it otherwise).",
    "prompts.windows": "Cut the text into N pieces of --tokens tokens.",
    "prompts.copied": "Number of copied random prompts, the induction probe. [4]",
    "prompts.copied_length": "Random tokens in each, before they are repeated. [25]",
    "capture.block_size": "Positions per block of the attention maps. [64]",
    "capture.keep_qk": "Store q and k for exact zoom in the viewer. [keep]",
    "seed": "Seed of every draw. [0]",
    "analysis.task": "induction, text, ioi, greater_than, ... or a .jsonl file. [induction]",
    "analysis.n": "Prompts of the task. [32]",
    "analysis.measures": "Of importance, e.g. ablation/mean,gradient; all of them if not given.",
    "analysis.edits": "E.g. mask,drop; all of them if not given.",
    "analysis.rule": "transfer, mask, drop, logit_bias, learned_sink, off_by_one or act. [transfer]",
    "analysis.amounts": "Of the edit, with commas. [0,0.25,0.5,0.75,1]",
    "analysis.method": "eap-ig, eap, exact, ...: see lens.circuits.score_edges. [eap-ig]",
    "analysis.steps": "Of the integrated gradients. [5]",
    "analysis.edges": "Of the circuit; 0: the smallest one that is faithful enough. [0]",
    "analysis.compare": "Folder of another circuit run: what the two circuits share, beside chance.",
}
_WHOLE = (
    "tokens",
    "windows",
    "copied",
    "copied_length",
    "block_size",
    "seed",
    "n",
    "steps",
    "edges",
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


def run_command(verb: str, text: str, *, needs_text: bool = True) -> Callable[..., None]:
    """The function of a command, for typer: its signature has one parameter a flag.

    Args:
        verb: `run`, or what the analysis is called.
        text: help.
        needs_text: refuse a command that names no prompts; else copied ones are profiled.
    """
    flags = {_parameter(dotted): dotted for dotted in SETTINGS_OF[verb]}
    types = {name: _type(dotted) for name, dotted in flags.items()}

    def command(**given: Any) -> None:
        output = Output(given["json"], given["quiet"], given["debug"])
        with output.session():
            values = {dotted: _plain(given[name]) for name, dotted in flags.items()}
            if verb != "run":
                values["what"] = verb
            settings = settings_of(
                given["config"], given["assignments"], values, needs_text=needs_text
            )
            if given["dry_run"]:
                from lens_analyses.estimate import estimate

                forecast = estimate(settings)
                output.result(forecast.text(), forecast.as_json())
                return
            execute(settings, given["out"], output, given["again"])

    parameters = {name: (kind, None) for name, kind in types.items()} | _AROUND
    command.__name__, command.__doc__ = verb, text
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


def settings_of(
    config: Path | None,
    assignments: list[str] | None,
    flags: dict[str, Any],
    *,
    needs_text: bool = True,
) -> "RunConfig":
    """The configuration of the file, with the assignments and then the flags on top.

    Args:
        config, assignments, flags: of the command line.
        needs_text: refuse a command that names no prompts; else copied ones are profiled.

    Raises:
        LensError: as `RunConfig.load`; UsageError: no text is named.
    """
    from lens_analyses.config import RunConfig, parse_assignments

    given = {name: value for name, value in flags.items() if value is not None}
    given = {**parse_assignments(assignments or []), **given}
    if needs_text:
        _check_text(config, given)
    return RunConfig.load(config, given)


def execute(settings: "RunConfig", out: Path, output: Output, again: bool) -> None:
    """Make the run and say what came of it."""
    from lens_analyses import runner

    finished = runner.execute(settings, out, output, again=again)
    output.result(finished.text(), finished.as_json())
    if finished.status != "success":
        raise SystemExit(PARTIAL)


def _parameter(dotted: str) -> str:
    return flag_name(dotted).replace("-", "_")


def _type(dotted: str) -> Any:
    """As typer reads it: a type that may be None, and the option's names and help."""
    name = flag_name(dotted)
    if dotted == "capture.keep_qk":
        return Annotated[bool | None, typer.Option(f"--{name}/--no-{name}", help=_HELP[dotted])]
    kind = (
        int
        if dotted.rpartition(".")[2] in _WHOLE
        else Path
        if dotted in ("prompts.text", "prompts.batch", "analysis.compare")
        else str
    )
    short = ["-m"] if dotted == "model.name" else []
    flag = "--model" if dotted == "model.name" else f"--{name}"
    return Annotated[kind | None, typer.Option(flag, *short, help=_HELP[dotted])]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _check_text(config: Path | None, given: dict[str, Any]) -> None:
    """A text must be named, unless only copied prompts are asked for.

    Raises:
        UsageError: neither.
    """
    named = ("prompts.text", "prompts.text_name", "prompts.batch", "prompts.copied")
    if config is None and not any(name in given for name in named):
        raise UsageError(
            "which text? --text FILE, --text-name moby-dick or --prompts FILE; "
            "or --copied N for copied random tokens alone"
        )
