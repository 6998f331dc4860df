"""Commands that go on from a run, made of its own configuration: what a page or a message tells a user to type.

Every path is quoted for a shell, and `--out` names the folder that the run lies in, so that a command can be pasted
anywhere (docs/schema/run-folder.md).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lens.common.errors import LensError

CONFIG = "config.toml"
DIFFUSION = "diffusion"
"""What a run is whose configuration no other command takes."""
NEED_TEXT = ("sinks", "redistribute", "policies", "mixers", "examples", "generate")
"""Analyses that copied prompts alone do not do for."""
_SOURCES = ("prompt", "text", "text_name", "batch", "audio", "image")
_OF_LABELS = ("heads", "sinks", "redistribute", "circuit")
_OF_PARTS = ("heads", "sinks", "generate")  # of an encoder-decoder, one attention at a time
_OF_TASKS = ("heads", "redistribute", "explain", "patch", "circuit")
_IN_PAIRS = ("patch", "circuit")


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
    parts = {part: dict(config.get(part, {})) for part in ("model", "prompts", "capture")}
    task = task_of(config, what)
    own = config.get("analysis", {}) if config.get("what") == what else {"task": task}
    found: dict[str, Any] = {"what": what}
    for part, values in {**parts, "analysis": own}.items():
        found |= {f"{part}.{name}": value for name, value in values.items() if value is not None}
    return found | ({"seed": config["seed"]} if "seed" in config else {})


def task_of(config: Mapping[str, Any], what: str) -> str | None:
    """The task of a run, for another analysis of it; None: it has none that this one takes.

    Args:
        config: of the run; nothing else of its own analysis is another's.
        what: the other analysis.
    """
    own = config.get("analysis")
    task = own.get("task") if isinstance(own, Mapping) else None
    if what not in _OF_TASKS or not isinstance(task, str) or task == "labels":
        return None  # labels come with their prompts
    return None if task == "text" and what in _IN_PAIRS else task


def _said(commands: Sequence[str]) -> str:
    *others, last = (f"`lens {one}`" for one in commands)
    return f"{', '.join(others)} and {last}"


def _check(config: Mapping[str, Any], what: str) -> None:
    whose = config.get("what")
    if whose == DIFFUSION:
        raise LensError(f"`lens {what}` takes no diffusion model; `lens diffusion` is for these")
    if whose == "vision" and what != whose:
        raise LensError(
            f"`lens {what}` reads no pictures that are not labelled; `lens vision` is for these"
        )
    prompts = config.get("prompts", {})
    labelled = prompts.get("images") or prompts.get("labelled")
    if what not in _OF_LABELS and labelled:
        raise LensError(f"`lens {what}` takes no labelled prompts; {_said(_OF_LABELS)} do")
    if what not in _OF_PARTS and config.get("model", {}).get("part"):
        raise LensError(f"`lens {what}` takes no encoder-decoder; {_said(_OF_PARTS)} do")
    if what in NEED_TEXT and not labelled and not any(prompts.get(name) for name in _SOURCES):
        raise LensError(
            f"`lens {what}` needs text, and this run has copied prompts alone; make a run with --prompt WORDS, --text FILE or "
            "--text-name moby-dick"
        )


def _command(verb: str, run: Path) -> str:
    return shlex.join(["lens", verb, "-c", str(run / CONFIG), "--out", str(run.parent)])
