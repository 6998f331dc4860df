"""Commands that go on from a run, made of its own configuration: what a page or a message tells a user to type.

Every path is quoted for a shell, and `--out` names the folder that the run lies in, so that a command can be pasted
anywhere (docs/schema/run-folder.md).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens.common.errors import LensError

CONFIG = "config.toml"
DIFFUSION = "diffusion"
"""What a run is whose configuration no other command takes."""
NEED_TEXT = ("sinks", "redistribute", "policies", "mixers", "examples", "generate")
"""Analyses that copied prompts alone do not do for."""
_SOURCES = ("prompt", "text", "text_name", "batch")


def again(run: Path, meta: Mapping[str, Any]) -> str:
    """The command that completes a run, or makes what failed once more.

    Args:
        run: folder of the run.
        meta: what its `run.json` says.
    """
    if meta.get("what") == DIFFUSION and meta.get("command"):
        return f"{meta['command']} {shlex.join(['--out', str(run.parent)])}"
    return _command("run", run)


def analysis(run: Path, config: Mapping[str, Any], what: str) -> str:
    """The command of another analysis of the same model on the same prompts.

    Args:
        run: folder of the run.
        config: of the run.
        what: "heads", "sinks", "redistribute", "policies", "mixers", "patch", "circuit" or "explain".

    Raises:
        LensError: it needs text, and the run has copied prompts alone, or it takes no such model.
    """
    _check(config, what)
    return _command(what, run)


def settings(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The same as settings of a job, dotted name -> value.

    Raises:
        LensError: as `analysis`.
    """
    _check(config, what)
    found: dict[str, Any] = {"what": what}
    for part in ("model", "prompts", "capture"):
        found |= {f"{part}.{name}": value for name, value in dict(config.get(part, {})).items()}
    return found | ({"seed": config["seed"]} if "seed" in config else {})


def _check(config: Mapping[str, Any], what: str) -> None:
    if config.get("what") == DIFFUSION:
        raise LensError(f"`lens {what}` takes no diffusion model; `lens diffusion` is for these")
    prompts = config.get("prompts", {})
    if what in NEED_TEXT and not any(prompts.get(name) for name in _SOURCES):
        raise LensError(
            f"`lens {what}` needs text, and this run has copied prompts alone; make a run with --prompt WORDS, --text FILE or "
            "--text-name moby-dick"
        )


def _command(verb: str, run: Path) -> str:
    return shlex.join(["lens", verb, "-c", str(run / CONFIG), "--out", str(run.parent)])
