"""`lens mixers` of a model of mixers alone: a run with its section and report, without traces, since nothing attends."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lens
from lens.models.vocabulary import around
from lens.runs import open_run
from lens.runs.opening import empty_table
from lens.runs.schema import HEADS, PROMPTS
from lens_analyses.config import RunConfig
from lens_analyses.console import log, refused_as_usage
from lens_analyses.making import Making, making
from lens_analyses.planned import Source
from lens_analyses.provenance import versions
from lens_analyses.report import render

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel


def execute(
    config: RunConfig, model: "LoadedModel", sources: Sequence[Source], runs: Path, again: bool
) -> Making:
    """The run of a model none of whose layers has softmax attention.

    Raises:
        UsageError: no mixer that is known, or texts that are too short.
    """
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
    with making(runs, config.as_mapping(), _meta(config, model, len(windows)), again=again) as made:
        start = time.monotonic()
        section = measured(model, windows, length, settings.block, config.seed)
        log.debug("%d windows in %.1f s", len(windows), time.monotonic() - start)
        made.writer.table("prompts", empty_table(PROMPTS))
        made.writer.table("heads", empty_table(HEADS))
        made.writer.record(*section.save(made.writer.path))
        report = render(open_run(made.writer.path), status="success")
        report.write(made.writer)
        made.headline = report.headline
    return made


def _meta(config: RunConfig, model: "LoadedModel", windows: int) -> dict[str, Any]:
    return {
        "title": f"{model.name} on {windows} windows of text, mixers alone",
        "what": config.what,
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
