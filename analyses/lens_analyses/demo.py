"""`lens demo`: real models on real text, from nothing to reports."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.runs.writer import find_by_config
from lens_analyses.config import (
    CaptureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    make_config,
)
from lens_analyses.console import PARTIAL, Output, log
from lens_analyses.jobs.store import JobStore
from lens_analyses.runner import Finished, execute, readable

EMBEDDED = (
    RunConfig(
        model=ModelConfig(name="text-lm-3l"),
        prompts=PromptConfig(
            text_name="moby-dick", tokens=128, windows=12, copied=8, copied_length=50
        ),
        capture=CaptureConfig(block_size=16),
    ),
    RunConfig(
        model=ModelConfig(name="induction-2l"),
        prompts=PromptConfig(copied=16, copied_length=25),
        capture=CaptureConfig(block_size=16),
    ),
    RunConfig(
        model=ModelConfig(name="stories260k"),
        prompts=PromptConfig(text_name="lily", copied=4, copied_length=50),
        capture=CaptureConfig(block_size=16),
    ),
)
"""A model with sinks and induction heads, one whose circuit is known, and one that has neither."""

LARGE_TOKENS = 2048
_TEXT = {"text_name": "moby-dick", "tokens": 96, "windows": 4, "copied": 4}
LATER = tuple(
    make_config({"what": what, "model": {"name": model}, "prompts": prompts})
    for what, model, prompts in (
        ("circuit", "induction-2l", {"copied": 4}),
        ("patch", "induction-2l", {"copied": 4}),
        ("sinks", "text-lm-3l", _TEXT),
        ("redistribute", "text-lm-3l", _TEXT),
        ("policies", "text-lm-3l", _TEXT),
        ("heads", "text-lm-3l", _TEXT),
    )
)
"""Analyses that are made while the dashboard already serves, so that each of its pages has something on it."""


@dataclass(frozen=True)
class Demonstration:
    """The runs of one demo."""

    finished: list[Finished]
    seconds: float

    @property
    def exit_code(self) -> int:
        """3 if it was stopped, else 0."""
        return 0 if all(one.status == "success" for one in self.finished) else PARTIAL

    def text(self) -> str:
        """The findings of each run, and where it lies."""
        parts = [f"{one.run.title}\n{_indented(one.text())}" for one in self.finished]
        return "\n\n".join(
            [*parts, f"{len(parts)} run{'s' if len(parts) > 1 else ''} in {self.seconds:.0f} s"]
        )

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"runs": [one.as_json() for one in self.finished], "seconds": round(self.seconds, 1)}


def run_demo(runs: Path, model: str | None, output: Output) -> Demonstration:
    """The embedded models, or one that is named, into run folders under `runs`.

    Raises:
        LensError: unknown model, or one that cannot be loaded.
    """
    start = time.monotonic()
    finished = []
    for config in EMBEDDED if model is None else (_recipe(model),):
        one = execute(config, runs, output)
        log.info("report: %s", one.run.path / "report.html")
        finished.append(one)
        if one.status != "success":
            break
    return Demonstration(finished, time.monotonic() - start)


def queue_later(runs: Path) -> int:
    """Queue the analyses of `LATER` that are not there yet, for a worker beside the dashboard; how many."""
    store = JobStore(runs)
    waiting = {job.command for job in store.jobs() if job.status in ("queued", "running")}
    queued = 0
    for config in LATER:
        made = readable(find_by_config(runs, config.as_mapping()))
        done = made is not None and made.status == "success"
        if not done and config.command() not in waiting:
            store.submit("run", config.as_mapping(), config.command())
            queued += 1
    return queued


def _recipe(model: str) -> RunConfig:
    """What the demo does with a model: its own recipe, or a chapter of Moby-Dick and copied tokens."""
    for config in EMBEDDED:
        if config.model.name == model:
            return config
    prompts = {"text_name": "moby-dick", "tokens": LARGE_TOKENS, "copied": 4, "copied_length": 64}
    return make_config({"model": {"name": model}, "prompts": prompts})


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
