"""Options that several commands share, and what a command is that takes each once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

from lens.common.errors import LensError
from lens.common.files import on_disk

RUNS = Path("runs")
RUN_COMMANDS = {
    "run": "Profile every attention head of a model on a text and on copied random tokens.",
    "heads": "Profile every head, then: role, importance by several measures, pattern, redundancy, pruning.",
    "sinks": "Profile every head, then: where sinks are, how they work, whether they matter, where mass moves.",
    "redistribute": "Profile every head, then: move attention off the first token; dose, side effects, which heads.",
    "policies": "Profile every head, then: what sparse policies keep and cost, and the cheapest one for each head.",
    "mixers": "Profile every head, then: what linear and recurrent mixers do, in one table beside the softmax heads.",
    "explain": "Profile every head, then: why heads attend where they do, part by part, and what they do without a part.",
    "vision": "Profile every head on pictures, then: what is looked at, how far, and which structure that has.",
    "examples": "Profile every head, then: the texts of a corpus and the pairs of tokens on which each attends most.",
    "generate": "Let the model write on, and profile every head on prompt and text as one trace.",
    "patch": "Profile every head, then: where the answer is carried, layer by token; stream, attention, MLPs, heads.",
    "circuit": "Profile every head, then: which edges carry a task; faithful, complete and minimal, beside random.",
}
"""Commands that make a run -> their help."""
Engine = Literal["local", "ray"]
"""Of `lens sweep`."""
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

Pictures = Annotated[
    str | None,
    typer.Option("--as", help="Of figures: svg, pdf, png, with commas; all of them if not given."),
]
Width = Annotated[
    str | None,
    typer.Option(help="Of figures: single (3.25 in, if not given) or double (6.75 in) column."),
]
RequirePictures = Annotated[
    bool,
    typer.Option("--require-pictures", help="Of figures: fail where no browser can draw them."),
]


class Command(TyperCommand):
    """Refuses an option of one value that is given twice, of which the last would stand for all; reads `~` in paths."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        *_, given = self.make_parser(ctx).parse_args(list(args))
        seen: set[str] = set()
        for one in given:
            name = max(one.opts, key=len)
            if not isinstance(one, TyperOption) or one.multiple or one.is_flag:
                continue
            if name in seen:
                ctx.fail(
                    f"{name} is given twice; give it once (where it takes several values: with commas)"
                )
            seen.add(name)
        rest = super().parse_args(ctx, args)
        for one in self.params:
            given = ctx.params.get(one.name)
            if isinstance(given, Path):
                ctx.params[one.name] = _place(ctx, max(one.opts, key=len), given)
        return rest


def _place(ctx: Any, name: str, given: Path) -> Path:
    """The path as this machine has it: of `--out ~/runs` the folder at home, and none called ~."""
    try:
        return on_disk(given)
    except LensError as error:
        return ctx.fail(f"{name}: {error}")
