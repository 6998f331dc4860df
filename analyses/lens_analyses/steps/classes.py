"""What each class loses without each head, by several metrics (the importance view of arXiv 2303.13731)."""

from collections.abc import Iterator

import pandas as pd

from lens import heads
from lens.common.errors import LensError
from lens.common.results import of_kind, with_ends
from lens.figures.importance import classes_grid
from lens.heads.pruning.outputs import METRICS
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import beside
from lens_analyses.steps.subject import Subject

_CHIEF = "probability"  # the metric that is told; all are in the tables


def classes(subject: Subject) -> Section:
    """Every head pruned alone: what the outputs lose, over all examples and class by class."""
    if not subject.labelled:
        raise LensError("the prompts have no labels; --images FOLDER has a sub-folder for each")
    task = subject.task
    found = heads.pruning.metrics(subject.model, task, progress=subject.progress)
    table, by_class = found.table(seed=subject.seed), found.classes(seed=subject.seed)
    named = getattr(subject.model.model.config, "id2label", None) or {}
    by_class["label"] = [str(named.get(number, number)) for number in by_class["class"]]
    counts = pd.Series(found.labels).value_counts(normalize=True)
    chance = float(counts.max())
    figures = {metric: found.plot(metric) for metric in METRICS}
    figures["classes"] = classes_grid(found, _CHIEF)
    tables = {"metrics": table, "classes": by_class, "agreement": found.agreement()}
    own = by_class[(by_class["metric"] == _CHIEF).to_numpy()]
    apart = own[((own["value"] > own["chance_high"]) & (own["low"] > own["all"])).to_numpy()]
    said = found.findings(seed=subject.seed)
    return Section(
        name="classes",
        title="What each class loses without a head",
        summary=(
            *of_kind(said, "accuracy", "most", "none"),
            f"{len(apart)} of {len(own)} pairs of a head and a class lose more {_CHIEF} of the right class than as many "
            "examples of any class do by chance, their intervals above the mean of all classes.",
            *of_kind(said, "agreement"),
        ),
        limits=(
            "Each head alone, its output set to zero: heads that stand in for each other look small.",
            "Without labels of their own, js, cosine and distance say that the output moves, not that it gets worse.",
            "Classes of few examples have wide intervals; a class is called apart where both bounds say so, and "
            f"of {len(own)} pairs 2.5 % lie above their bound of chance anyway.",
            *task.dropped,
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={
            "metrics": list(METRICS),
            "baseline": found.baseline,
            "examples": found.n,
            "accuracy": found.accuracy,
            "chance": chance,
            "seed": subject.seed,
        },
        tables=tables,
        figures=figures,
        headlines=tuple(_headline(apart, len(own))),
    )


def _headline(apart: pd.DataFrame, pairs: int) -> Iterator[Headline]:
    if apart.empty:
        return
    best = apart.iloc[int((apart["value"] - apart["all"]).to_numpy().argmax())]
    every = {"value": best["all"], "low": best["chance_low"], "high": best["chance_high"]}
    others = with_ends(every, "value", ".2g", plain=True)
    yield beside(
        f"Without {best['name']} the class {best['label']} loses {with_ends(best, 'value', '.2g', plain=True)} of its "
        f"{_CHIEF}, as many examples of any class {others}.",
        "value",
        best.to_dict(),
        every,
        "as many examples of any class",
        figure="classes",
        many=pairs,
    )


_COLUMNS = {
    "metric": "accuracy, probability (of the right class), loss (nats): what is lost without the head; js (nats), cosine, "
    "distance: how far outputs and embedding move.",
    "class": "Number of the label.",
    "label": "Its name, as the model has it.",
    "layer": "Layer, from 0.",
    "head": "Head of the layer, from 0.",
    "name": "The head.",
    "value": "Mean over the examples.",
    "low": "Low end of its 95 % interval over examples.",
    "high": "High end of it.",
    "n": "Number of examples.",
    "all": "Mean over the examples of all classes.",
    "chance_low": "Low end of what as many examples of any class have, 95 %.",
    "chance_high": "High end of it.",
    "first": "One metric.",
    "second": "The other.",
    "tau": "Kendall's tau-b of the order of all heads.",
}
