"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
RunsDir = Annotated[
    Path,
    typer.Option("--runs", help="Folder of run folders.", envvar="LENS_RUNS", show_default=True),
]
Run = Annotated[str, typer.Argument(help="A run folder, or its id (or the end of it) in --runs.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port of the dashboard.")]
Out = Annotated[Path, typer.Option(help="Folder for the run folder.", envvar="LENS_RUNS")]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; flags go on top of it.")
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting, e.g. capture.block_size=32.")
]
Again = Annotated[bool, typer.Option("--again", help="Compute anew what is already finished.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only estimate tokens, time, memory and disk.")
]
