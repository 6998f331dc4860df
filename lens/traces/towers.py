"""The traces of one prompt of a model of several encoders side by side: one for each tower, from passes of the whole."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.towers import prompt_of, read_pairs, run_whole
from lens.traces.parts import TraceParts
from lens.traces.recorder import Once, Recorder
from lens.traces.statistics import LayerRecord, Settings
from lens.traces.writing import Writing, folders_of


def capture_towers(
    model: LoadedModel,
    prompts: Any,
    settings: Settings,
    *,
    out: str | Path | None,
    progress: bool,
    seed: int | None,
) -> TraceParts | list[TraceParts]:
    """As `lens.capture`, whose arguments and errors these are."""
    found, is_single = read_pairs(model, prompts)
    traces = []
    layers = sum(len(tower.info.attending) for tower in model.towers.values())
    with advancing(f"{model.name}: layers", len(found) * layers, progress) as advance:
        for inputs, folder in zip(found, folders_of(out, len(found), is_single), strict=True):
            done = {}
            for name, tower in model.towers.items():
                start = time.perf_counter()
                prompt = prompt_of(tower, inputs)
                writing = Writing(tower, prompt, settings, folder / name if folder else None)
                recorder = Once(
                    Recorder(settings, partial(_take, writing, advance)), model.info.class_name
                )
                run_whole(model, tower, inputs, recorder.on_layer)
                note = {"seed": seed, "chunk": None, "processes": 1}
                done[name] = writing.finish(note | {"seconds": time.perf_counter() - start})
            traces.append(TraceParts(done))
    return traces[0] if is_single else traces


def _take(writing: Writing, advance: Any, record: LayerRecord) -> None:
    writing.take(record)
    advance(1)
