"""`lens mixers` and `lens circuit` of a model of mixers alone: a run with its sections and report, without traces, since nothing attends."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lens
from lens.common.results import counted
from lens.models.vocabulary import around
from lens.runs import open_run
from lens.runs.opening import empty_table
from lens.runs.schema import HEADS, PROMPTS
from lens_analyses.analysing import analyse
from lens_analyses.config import RunConfig
from lens_analyses.console import Output, log, refused_as_usage
from lens_analyses.estimate import Pace, expect
from lens_analyses.making import Making, making
from lens_analyses.planned import Source
from lens_analyses.provenance import versions
from lens_analyses.report import render
from lens_analyses.steps.subject import Subject

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel

_Work = Callable[[Making], None]


def execute(
    config: RunConfig,
    model: "LoadedModel",
    sources: Sequence[Source],
    runs: Path,
    output: Output,
    again: bool,
) -> Making:
    """The run of a model none of whose layers has softmax attention.

    Raises:
        UsageError: no mixer that is known, or texts that are too short; a circuit of text, which is a profile's.
    """
    plan_of = _circuit if config.what == "circuit" else _mixers
    about, work = plan_of(config, model, sources, output)
    with making(runs, config.as_mapping(), _meta(config, model, about), again=again) as made:
        made.writer.table("prompts", empty_table(PROMPTS))
        made.writer.table("heads", empty_table(HEADS))
        work(made)
        report = render(
            open_run(made.writer.path), status="success" if made.error is None else "partial"
        )
        report.write(made.writer)
        made.headline = report.headline
    return made


def _circuit(
    config: RunConfig, model: "LoadedModel", sources: Sequence[Source], output: Output
) -> tuple[str, _Work]:
    """The title of the run, and what is done in it; what cannot be is refused before."""
    from lens_analyses.inputs import plan
    from lens_analyses.steps.subject import analysed

    settings: Any = config.analysis
    with refused_as_usage():
        asked = analysed(config, model, plan(model, config, list(sources)))
        expected = expect(config, model, [], *asked)

    def work(made: Making) -> None:
        subject = Subject(model, open_run(made.writer.path), config, output)
        made.error = analyse(subject, made.writer, Pace(expected.steps))

    return f"A circuit of {settings.task} in {model.name} (mixers alone)", work


def _mixers(
    config: RunConfig, model: "LoadedModel", sources: Sequence[Source], _: Output
) -> tuple[str, _Work]:
    """See `_circuit`."""
    from lens_analyses.inputs import plan
    from lens_analyses.steps.mixers import measured
    from lens_analyses.steps.subject import window_length, windows_of

    settings: Any = config.analysis
    with refused_as_usage():
        texts = [one.ids for one in plan(model, config, list(sources)) if one.kind == "text"]
        pair = around(model)
        length = window_length(texts, pair, settings)
        windows = windows_of(texts, pair, settings)
        lens.mixers.capture(model, windows[0][:2], progress=False)  # whether it has one

    def work(made: Making) -> None:
        start = time.monotonic()
        section = measured(model, windows, length, settings.block, config.seed)
        log.debug("%d windows in %.1f s", len(windows), time.monotonic() - start)
        made.writer.record(*section.save(made.writer.path))

    return f"{model.name} on {counted(len(windows), 'window')} of text (mixers alone)", work


def _meta(config: RunConfig, model: "LoadedModel", about: str) -> dict[str, Any]:
    return {
        "title": about,
        "what": config.what,
        "task": getattr(config.analysis, "task", None),
        "command": config.command(),
        "model": model.describe(),
        "device": str(model.device),
        "backend": None,
        "block_size": None,
        "seed": config.seed,
        "bos": "absent",
        "prompts": {"total": 0, "done": 0, "tokens": 0},
        "versions": versions(),
    }
