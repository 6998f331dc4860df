"""The `lens` command: reads arguments, imports the rest only for the command that runs."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lens.common.errors import in_words
from lens_analyses.console import ERROR, PARTIAL, Output, UsageError, say
from lens_analyses.diffusing import diffusion
from lens_analyses.options import (
    RUN_COMMANDS,
    RUNS,
    Again,
    Command,
    Debug,
    DryRun,
    Engine,
    Json,
    Out,
    Pictures,
    Port,
    Quiet,
    RequirePictures,
    Run,
    RunsDir,
    Width,
)


class _Commands(TyperGroup):
    """All commands; those that make a run get their many flags only when one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in RUN_COMMANDS:
            from lens_analyses.run_commands import run_command

            alone = typer.Typer(add_completion=False, **_LOOKS)
            alone.command(name, help=RUN_COMMANDS[name], cls=Command)(run_command(name))
            command = typer.main.get_command(alone)
        return name, command, rest


_LOOKS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(
    name="lens",
    cls=_Commands,
    help="See what every attention head of a real model does.",
    epilog="Exit codes: 0 done, 1 error, 2 wrong usage, 3 partly done (the same command completes it).",
    add_completion=False,
    **_LOOKS,
)


@app.command(cls=Command)
def demo(
    model: Annotated[
        str | None, typer.Option(help="Instead of the three embedded models, e.g. smollm2-135m.")
    ] = None,
    view: Annotated[
        bool, typer.Option(help="Serve the dashboard at the end; not with --json.")
    ] = True,
    out: Annotated[
        Path, typer.Option(help="Folder for the run folders.", envvar="LENS_RUNS")
    ] = RUNS,
    port: Port = 8765,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Analyse real models on real text, write the reports, serve the dashboard."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.demo import queue_later, run_demo
        from lens_analyses.viewing import check_port, view_runs

        if view and not json:
            check_port(port)
        summary = run_demo(out, model, output)
        output.result(summary.text(), summary.as_json())
        if summary.exit_code:
            raise SystemExit(summary.exit_code)
        if view and not json:
            whole = model is None
            if whole and (queued := queue_later(out)) and not quiet:
                say(
                    f"{queued} more analyses are made while the dashboard serves: see its page /jobs"
                )
            view_runs(out, port, jobs=whole, quiet=quiet)


for _verb, _text in RUN_COMMANDS.items():
    app.command(_verb, help=_text)(lambda: None)  # listed here, and made when it is called
app.command(cls=Command)(diffusion)


@app.command(cls=Command)
def sweep(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            help='TOML file, e.g. with the two lines models = ["text-lm-3l"] and analyses = ["profile", "heads"].',
        ),
    ],
    out: Out = RUNS,
    again: Again = False,
    engine: Annotated[
        Engine, typer.Option(help="One after the other here, or tasks of Ray.")
    ] = "local",
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make many runs, models × analyses × tasks; finished ones are reused, the same command continues."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.sweeps.forecast import forecast
        from lens_analyses.sweeps.plan import read_plan
        from lens_analyses.sweeps.running import run_sweep

        plan = read_plan(config)
        if dry_run:
            expected = forecast(plan, out)
            output.result(expected.text(), expected.as_json())
            return
        words = ["lens", "sweep", "-c", str(config), "--out", str(out)]
        words += ["--engine", engine] if engine != "local" else []
        done = run_sweep(plan, out, output, command=shlex.join(words), again=again, engine=engine)
        output.result(done.text(), done.as_json())
        if done.exit_code:
            raise SystemExit(done.exit_code)


@app.command(cls=Command)
def view(
    target: Annotated[
        Path | None,
        typer.Argument(help="A folder of runs, or one run folder; --runs if not given."),
    ] = None,
    runs: RunsDir = RUNS,
    port: Port = 8765,
    host: Annotated[
        str, typer.Option(help="Address to bind; another than this needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(help="Ask for it as ?token=...", envvar="LENS_TOKEN")
    ] = None,
    jobs: Annotated[
        bool, typer.Option("--jobs", help="Let the page /jobs start analyses; starts a worker.")
    ] = False,
    files: Annotated[
        Path | None,
        typer.Option(help="With --jobs: a folder that they may read texts and models from."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve the dashboard over finished runs."""
    with Output(False, quiet, debug).session():
        from lens_analyses.viewing import view_runs

        where = {"host": host, "token": token}
        view_runs(target or runs, port, **where, jobs=jobs, files=files, quiet=quiet)


@app.command(cls=Command)
def worker(
    runs: RunsDir = RUNS,
    once: Annotated[bool, typer.Option("--once", help="End when nothing waits.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compute the analyses that were started from the dashboard, one after the other."""
    with Output(False, quiet, debug).session():
        from lens_analyses.jobs.worker import work_until_stopped

        work_until_stopped(runs, once=once)


@app.command(cls=Command)
def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.html and report.json.")
    ] = None,
    runs: RunsDir = RUNS,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write report.html and report.json of a run."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.listing import resolve
        from lens_analyses.making import check_writable
        from lens_analyses.report import write_report

        found = resolve(run, runs)
        check_writable(out or found.path)
        written = write_report(found, out)
        output.result(f"report: {written.html}", written.as_json())
        if written.status != "success":
            raise SystemExit(PARTIAL)


@app.command(cls=Command)
def delete(
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: RunsDir = RUNS,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Delete a run: the files that it wrote; whatever else lies in its folder stays."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.listing import delete_run, resolve

        found = resolve(run, runs)
        if not yes and not (
            sys.stdin.isatty() and typer.confirm(f"Delete {found.path}?", err=True)
        ):
            raise UsageError(f"{found.path} is not deleted; --yes deletes it without asking")
        left = delete_run(found)
        output.result(
            f"deleted {found.id}"
            + (f"; {left} files of others stay in {found.path}" if left else ""),
            {"id": found.id, "path": str(found.path), "left": left},
        )


@app.command(cls=Command)
def compare(
    a: Annotated[str, typer.Argument(help="A run folder, or its id (or the end of it) in --runs.")],
    b: Annotated[str, typer.Argument(help="Another one; every difference is B - A.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            help="More make a series, such as the checkpoints of a training in their order."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for comparison.html and .json, or series.html and .json."
        ),
    ] = None,
    runs: RunsDir = RUNS,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", min=0, max=2**32 - 1)] = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the comparison of two runs, heads, scores and sections side by side, or of heads over a series of runs."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.comparison import FOLDER, write_comparison
        from lens_analyses.comparison.series import write_series
        from lens_analyses.listing import resolve
        from lens_analyses.making import check_writable

        found = [resolve(name, runs) for name in (a, b, *(more or ()))]
        place = out or runs / FOLDER / f"{found[0].id}--{found[-1].id}{'-series' * bool(more)}"
        check_writable(place)
        words = ["lens", "compare", *(str(run.path) for run in found), "--seed", str(seed)]
        command = shlex.join(words)
        if more:
            written = write_series(found, place, command=command, seed=seed)
        else:
            written = write_comparison(found[0], found[1], place, command=command, seed=seed)
        output.result(written.text(), written.as_json())
        if {run.status for run in found} != {"success"}:
            raise SystemExit(PARTIAL)


@app.command(cls=Command)
def export(
    run: Run,
    form: Annotated[
        str, typer.Option("--format", "-f", help="headvis, csv, parquet, graph or figures.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; exports/RUN/FORMAT in --runs if not given."),
    ] = None,
    pictures: Pictures = None,
    width: Width = None,
    require_pictures: RequirePictures = False,
    runs: RunsDir = RUNS,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a run for other tools: a HeadVis tree, tables, circuits, or pictures for a paper."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.exporting import FOLDER, export_run
        from lens_analyses.listing import resolve
        from lens_analyses.making import check_writable

        found = resolve(run, runs)
        if require_pictures and form != "figures":
            raise UsageError(f"--require-pictures goes with -f figures, not with -f {form}")
        place = out or runs / FOLDER / found.id / form
        check_writable(place)
        kinds = None
        if pictures is not None:
            kinds = tuple(part.strip() for part in pictures.split(",") if part.strip())
        written = export_run(found, form, place, pictures=kinds, width=width)
        output.result(written.text(), written.as_json())
        if written.missing and require_pictures:
            raise SystemExit(ERROR)


@app.command("list", cls=Command)
def list_(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of run folders; --runs if not given.")
    ] = None,
    runs: Annotated[
        Path,
        typer.Option("--runs", "--out", help="The same.", envvar="LENS_RUNS", show_default=True),
    ] = RUNS,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List runs with their status."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.listing import listing_of

        listing = listing_of(folder or runs)
        output.result(listing.text(), listing.as_json())


@app.command(cls=Command)
def validate(
    run: Run,
    runs: RunsDir = RUNS,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a run folder: schema, files, row sums, NaN."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.listing import resolve, verdict_on

        verdict = verdict_on(resolve(run, runs))
        output.result(verdict.text(), verdict.as_json())
        if verdict.exit_code:
            raise SystemExit(verdict.exit_code)


@app.command(cls=Command)
def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Say what this machine has, and what falls back to what."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.doctor import examine

        diagnosis = examine()
        output.result(diagnosis.text(), diagnosis.as_json())
        if diagnosis.exit_code:
            raise SystemExit(diagnosis.exit_code)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """See what every attention head of a real model does."""
    if version:
        import lens

        typer.echo(f"attention-lens {lens.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    try:
        app(sys.argv[1:] if arguments is None else arguments, prog_name="lens")
    except OSError as error:  # of the help; what the commands meet is told by their own session
        say(f"error: {in_words(error)}")
        raise SystemExit(ERROR) from None
