"""`lens diffusion`: a folder of a diffusion model run once, each of its attentions as a run whose prompts are the steps."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lens_analyses.console import PARTIAL, Output, UsageError
from lens_analyses.options import RUNS, Again, Debug, Json, Out, Quiet

Model = Annotated[
    Path,
    typer.Option(
        "--model", "-m", help="Folder of a pipeline of diffusers, or of its transformer or UNet."
    ),
]
Prompt = Annotated[
    str, typer.Option(help="What the picture is of; a transformer alone reads random numbers.")
]
Steps = Annotated[int, typer.Option(min=1, max=10_000, help="Denoising steps.")]
Captured = Annotated[
    str | None,
    typer.Option(
        "--capture",
        help="Numbers of the steps that are looked at, from 0, with commas; four if not given.",
    ),
]
Words = Annotated[
    str | None,
    typer.Option(
        help="Keys whose maps are drawn, with commas; the first of the text if not given."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the noise.")]
Size = Annotated[
    int | None,
    typer.Option(
        min=8, max=4096, help="Pixels a side of the picture (latents of a transformer alone)."
    ),
]


def diffusion(
    model: Model,
    prompt: Prompt = "",
    steps: Steps = 20,
    capture: Captured = None,
    words: Words = None,
    size: Size = None,
    seed: Seed = 0,
    out: Out = RUNS,
    again: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a diffusion model, and profile its attention step by step: maps of words, quadrants, entropy."""
    output = Output(json, quiet, debug)
    with output.session():
        from lens_analyses.config.paths import local
        from lens_analyses.denoised import execute

        given: dict[str, Any] = {"name": str(model), "steps": steps, "seed": seed}
        given |= {"prompt": prompt, "size": size, "words": words}
        given["capture"] = _numbers(capture, steps)
        given["command"] = shlex.join(
            [
                *("lens", "diffusion", "--model", str(local(str(model))), "--steps", str(steps)),
                *("--capture", ",".join(map(str, given["capture"])), "--seed", str(seed)),
                *(("--prompt", prompt) if prompt else ()),
                *(("--words", words) if words else ()),
                *(("--size", str(size)) if size else ()),
            ]
        )
        finished = execute(given, out, output, again=again)
        output.result(finished.text(), finished.as_json())
        if finished.status != "success":
            raise SystemExit(PARTIAL)


def _numbers(words: str | None, steps: int) -> list[int]:
    """The steps that are captured: four from the first to the last, if none are named.

    Raises:
        UsageError: what is no step.
    """
    if words is None:
        return sorted({round(part * (steps - 1) / 3) for part in range(4)})
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        found = [-1]
    if len(set(found)) < len(found) or not all(0 <= step < steps for step in found):
        raise UsageError(
            f"--capture must be different numbers of 0 to {steps - 1}, with commas; got {words!r}"
        )
    return sorted(found)
