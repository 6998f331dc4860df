"""Which attention and MLP sub-layers the model can do without."""

import numpy as np

from lens.common.errors import LensError
from lens.common.results import ends, few
from lens.heads import sublayers as measures
from lens.heads.pruning.sublayer_scores import BlockInfluence, SkipSweep
from lens.runs.sections import Section
from lens.stats.verdicts import rivals
from lens_analyses.config.sizes import MOST_REMOVED
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_highest
from lens_analyses.steps.subject import Subject


def layers(subject: Subject) -> Section:
    """Each sub-layer left out alone, one after another, and how far each layer turns the stream."""
    model, task = subject.model, subject.task
    try:
        sweep = measures.importance(model, task, progress=subject.progress)
    except LensError as problem:
        return Section(
            name="layers",
            title="Which sub-layers matter",
            summary=("Not measured.",),
            limits=(f"{problem}.",),
            columns={},
            configuration={"task": task.name},
        )
    influence = measures.block_influence(model, task)
    tables = {
        "sweep": sweep.table(seed=subject.seed),
        "influence": influence.table(seed=subject.seed),
    }
    figures = {"sweep": sweep.plot(), "influence": influence.plot()}
    said = [_missed(sweep, subject.seed), _least(influence, subject.seed)]
    limits = ["A sub-layer that is left out adds 0; nothing was trained again."]
    if len(sweep.names) <= MOST_REMOVED:
        removal = measures.greedy_removal(model, task, progress=subject.progress)
        tables["removal"], figures["removal"] = removal.table(seed=subject.seed), removal.plot()
        said.append(
            f"Taken out first by {removal.distance} of the outputs: {', '.join(removal.order)}; "
            f"{task.metric} goes from {removal.losses[0].mean():.3g} to {removal.losses[-1].mean():.3g}."
        )
    else:
        limits.append(
            f"No greedy removal: {len(sweep.names)} sub-layers, at most {MOST_REMOVED} here; use "
            "lens.heads.sublayers.greedy_removal."
        )
    return Section(
        name="layers",
        title="Which sub-layers matter",
        summary=tuple(said),
        limits=tuple(limits),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"task": task.name, "distance": sweep.distance, "prompts": task.n},
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_highest(
                tables["sweep"],
                "drop",
                f"{{name}} is missed most on {task.name}: {task.metric} is worse by {{value}} without it, by "
                "{baseline} without the median sub-layer.",
                "the median sub-layer",
                unit=task.metric,
                figure="sweep",
                whole=float(np.abs(sweep.clean).max()),
            )
        ),
    )


def _missed(sweep: SkipSweep, seed: int) -> str:
    """The sub-layer that is missed most, beside the median one, and those that it is not told apart from."""
    table, worst = sweep.table(seed=seed), int(sweep.drops.mean(1).argmax())
    row = table.iloc[worst]
    alike = [sweep.names[at] for at in rivals(sweep.drops, worst, seed)]
    return (
        f"Missed most on {sweep.task} is {sweep.names[worst]}: {sweep.metric} is worse by {row['drop']:.3g}"
        f"{ends(row['drop_low'], row['drop_high'])} without it, by {table['drop'].median():.3g} without the median "
        f"sub-layer{f'; not told apart from {few(alike)}' if alike else ''}."
    )


def _least(influence: BlockInfluence, seed: int) -> str:
    """The layer that turns the stream least, and those that it is not told apart from."""
    turns = influence.per_prompt
    least = int(turns.mean(1).argmin())
    row = influence.table(seed=seed).iloc[least]
    alike = [f"L{at}" for at in rivals(-turns, least, seed)]
    return (
        f"Layer {least} turns the residual stream least (1 - cosine {row['influence']:.3g}"
        f"{ends(row['low'], row['high'])}){f'; not told apart from {few(alike)}' if alike else ''}."
    )


_COLUMNS = {
    "name": "The sub-layer; in `removal` the last one taken out.",
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
