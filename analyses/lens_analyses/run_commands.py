"""Commands that make a run: what `lens run`, `lens heads` and their likes have in common."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lens_analyses.console import PARTIAL, Output, UsageError
from lens_analyses.options import (
    RUNS,
    Again,
    Assignments,
    Config,
    Copied,
    Debug,
    Json,
    Model,
    N,
    Out,
    Quiet,
    Seed,
    Task,
    Text,
    TextName,
    Tokens,
    Windows,
)

if TYPE_CHECKING:
    from lens_analyses.config import RunConfig


def heads(
    model: Model = None,
    text: Text = None,
    text_name: TextName = None,
    tokens: Tokens = None,
    windows: Windows = None,
    copied: Copied = None,
    task: Task = None,
    n: N = None,
    measures: Annotated[
        str | None,
        typer.Option(help="Of importance, e.g. ablation/mean,gradient; all of them if not given."),
    ] = None,
    seed: Seed = None,
    config: Config = None,
    assignments: Assignments = None,
    out: Out = RUNS,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Profile every head, then: role, importance by several measures, pattern, redundancy, pruning."""
    output = Output(json, quiet, debug)
    flags = {
        "what": "heads",
        "model.name": model,
        "prompts.text": None if text is None else str(text),
        "prompts.text_name": text_name,
        "prompts.tokens": tokens,
        "prompts.windows": windows,
        "prompts.copied": copied,
        "analysis.task": task,
        "analysis.n": n,
        "analysis.measures": measures,
        "seed": seed,
    }
    with output.session():
        execute(settings_of(config, assignments, flags), out, output, again)


def sinks(
    model: Model = None,
    text: Text = None,
    text_name: TextName = None,
    tokens: Tokens = None,
    windows: Windows = None,
    n: N = None,
    edits: Annotated[
        str | None,
        typer.Option(help="E.g. mask,drop; all of them if not given."),
    ] = None,
    amounts: Annotated[
        str | None, typer.Option(help="Of the dose-response curve, with commas.")
    ] = None,
    seed: Seed = None,
    config: Config = None,
    assignments: Assignments = None,
    out: Out = RUNS,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Profile every head, then: where sinks are, how they work, whether they matter, where mass moves."""
    output = Output(json, quiet, debug)
    flags = {
        "what": "sinks",
        "model.name": model,
        "prompts.text": None if text is None else str(text),
        "prompts.text_name": text_name,
        "prompts.tokens": tokens,
        "prompts.windows": windows,
        "analysis.n": n,
        "analysis.edits": edits,
        "analysis.amounts": amounts,
        "seed": seed,
    }
    with output.session():
        execute(settings_of(config, assignments, flags), out, output, again)


def redistribute(
    model: Model = None,
    text: Text = None,
    text_name: TextName = None,
    tokens: Tokens = None,
    windows: Windows = None,
    task: Task = None,
    n: N = None,
    rule: Annotated[
        str | None,
        typer.Option(help="transfer, mask, drop, logit_bias or learned_sink. [transfer]"),
    ] = None,
    amounts: Annotated[
        str | None, typer.Option(help="Of the edit, with commas. [0,0.25,0.5,0.75,1]")
    ] = None,
    seed: Seed = None,
    config: Config = None,
    assignments: Assignments = None,
    out: Out = RUNS,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Profile every head, then: move attention off the first token; dose, side effects, which heads."""
    output = Output(json, quiet, debug)
    flags = {
        "what": "redistribute",
        "model.name": model,
        "prompts.text": None if text is None else str(text),
        "prompts.text_name": text_name,
        "prompts.tokens": tokens,
        "prompts.windows": windows,
        "analysis.task": task,
        "analysis.n": n,
        "analysis.rule": rule,
        "analysis.amounts": amounts,
        "seed": seed,
    }
    with output.session():
        execute(settings_of(config, assignments, flags), out, output, again)


def circuit(
    model: Model = None,
    text: Text = None,
    text_name: TextName = None,
    tokens: Tokens = None,
    windows: Windows = None,
    copied: Copied = None,
    task: Task = None,
    n: N = None,
    method: Annotated[
        str | None,
        typer.Option(help="eap-ig, eap, exact, ...: see lens.circuits.score_edges. [eap-ig]"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the integrated gradients. [5]")] = None,
    edges: Annotated[
        int | None,
        typer.Option(help="Of the circuit; 0: the smallest one that is faithful enough. [0]"),
    ] = None,
    seed: Seed = None,
    config: Config = None,
    assignments: Assignments = None,
    out: Out = RUNS,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Profile every head, then: which edges carry a task; faithful, complete and minimal, beside random."""
    output = Output(json, quiet, debug)
    flags = {
        "what": "circuit",
        "model.name": model,
        "prompts.text": None if text is None else str(text),
        "prompts.text_name": text_name,
        "prompts.tokens": tokens,
        "prompts.windows": windows,
        "prompts.copied": copied,
        "analysis.task": task,
        "analysis.n": n,
        "analysis.method": method,
        "analysis.steps": steps,
        "analysis.edges": edges,
        "seed": seed,
    }
    with output.session():
        execute(settings_of(config, assignments, flags, needs_text=False), out, output, again)


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
