"""Which attention and MLP sub-layers the model can do without."""

import numpy as np

from lens.common.errors import LensError
from lens.common.results import Result
from lens.heads import sublayers as measures
from lens.heads.pruning.sublayer_scores import SkipSweep
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.config.sizes import MOST_REMOVED
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_highest
from lens_analyses.steps.subject import Subject


def layers(subject: Subject) -> Section:
    """Each sub-layer left out alone, one after another, and how far each layer turns the stream."""
    model, task = subject.model, subject.task
    found: dict[str, Result] = {}
    limits = ["A sub-layer that is left out adds 0; nothing was trained again."]
    headlines: tuple[Headline, ...] = ()
    refused = []
    try:
        found["influence"] = measures.block_influence(model, task, progress=subject.progress)
    except LensError as problem:
        refused.append(f"How far layers turn the stream is not known: {problem}.")
    try:
        sweep = measures.importance(model, task, progress=subject.progress)
        found["sweep"] = sweep
        headlines = _headlines(sweep, subject.seed)
        if len(sweep.names) <= MOST_REMOVED:
            found["removal"] = measures.greedy_removal(model, task, progress=subject.progress)
        else:
            limits.append(
                f"No greedy removal: {len(sweep.names)} sub-layers, at most {MOST_REMOVED} here; use "
                "lens.heads.sublayers.greedy_removal."
            )
    except LensError as problem:
        refused.append(f"No sub-layer was left out: {problem}.")
    if not found:
        raise LensError(" ".join(refused).removesuffix("."))
    named = {name: found[name] for name in ("sweep", "influence", "removal") if name in found}
    tables = {name: one.table(seed=subject.seed) for name, one in named.items()}  # pyright: ignore[reportCallIssue]
    return Section(
        name="layers",
        title="Which sub-layers matter",
        summary=tuple(said for one in named.values() for said in one.findings(seed=subject.seed)),  # pyright: ignore[reportCallIssue]
        limits=(*limits, *refused),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"task": task.name, "prompts": task.n},
        tables=tables,
        figures={name: one.plot() for name, one in named.items()},
        headlines=headlines,
    )


def _headlines(sweep: SkipSweep, seed: int) -> tuple[Headline, ...]:
    """The sub-layer that is missed most, beside the median one."""
    return tuple(
        of_highest(
            sweep.table(seed=seed),
            "drop",
            f"{{name}} is missed most on {sweep.task}: {sweep.metric} is worse by {{value}} without it, by {{baseline}} without "
            "the median sub-layer.",
            "the median sub-layer",
            unit=sweep.metric,
            figure="sweep",
            whole=float(np.abs(sweep.clean).max()),
        )
    )


_COLUMNS = {
    "name": "The sub-layer; in the table removal the last one taken out.",
    "drop": "What the task loses without it, positive = worse, in units of the metric.",
    "distance": "Mean distance of the outputs from those of the whole model.",
    "layer": "Layer, from 0.",
    "influence": "1 - cosine of the residual stream before and after the layer (ShortGPT).",
    "removed": "Sub-layers taken out so far.",
    "metric": "The task's metric.",
    "low": "Low end of the 95 % interval over prompts.",
    "high": "High end of the 95 % interval.",
    "n": "Number of prompts.",
}
