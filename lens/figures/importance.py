"""Figures of `lens.heads`: the importance of every head for a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import numpy as np
import plotly.graph_objects as go

from lens.common.plots import draws
from lens.figures.grids import grid
from lens.figures.style import Look
from lens.stats.verdicts import of_many_told

if TYPE_CHECKING:
    from lens.heads.measures.scores import HeadScores
    from lens.heads.pruning.outputs import PruningMetrics


@draws("HeadScores")
def importance_grid(scores: HeadScores, **look: Unpack[Look]) -> go.Figure:
    """Importance of every head: layers down, heads across; red = the task goes worse without it.

    Example:
        >>> scores = lens.heads.importance(model, task, method="ablation")
        >>> lens.figures.importance_grid(scores).layout.title.text
        'Ablation (mean) on induction: most at L0H0, 5.09 [4.22, 5.83] (loss)'
    """
    text = [
        [
            "" if np.isnan(error) else f" ± {error:.2g} (standard error, {scores.n} prompts)"
            for error in row
        ]
        for row in scores.stderr
    ]
    return grid(
        scores.values,
        _finding(scores),
        look,
        unit=scores.metric,
        text=text,
        signed=True,
        meta={"by": scores.label, "task": scores.task, "model": scores.model},
    )


def _finding(scores: HeadScores) -> str:
    table, least = scores.table(), 0 if scores.absolute else -np.inf
    best = table.iloc[0]
    told = of_many_told(best, "value", ".3g", len(table), scores.n, plain=True, least=least)
    what = f"{scores.label} on {scores.task}"
    return f"{what[0].upper()}{what[1:]}: most at {best['name']}, {told} ({scores.metric})"


@draws("PruningMetrics")
def pruning_grid(
    metrics: PruningMetrics,
    metric: str = "probability",
    label: int | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Layers × heads by one metric of `lens.heads.pruning.metrics`, of all examples or of those of one class."""
    values = metrics.values(metric) if label is None else metrics.by_class(metric)[label]
    layer, number = np.unravel_index(values.argmax(), values.shape)
    of = "" if label is None else f" of class {label}"
    name, told = f"L{layer}H{number}", f"{values.max():.3g}"
    if label is None:
        table = metrics.table()
        (row,) = table[(table["metric"] == metric) & (table["name"] == name)].to_dict("records")
        told = of_many_told(row, "value", ".3g", values.size, metrics.n, plain=True)
    found = f"{metric}{of} without each head: most at {name}, {told}"
    meta = {"metric": metric, "baseline": metrics.baseline, "model": metrics.model}
    return grid(values, found, look, unit=metric, signed=True, meta=meta)


def classes_grid(
    metrics: PruningMetrics, metric: str = "probability", **look: Unpack[Look]
) -> go.Figure:
    """Classes × heads by one metric: what each class loses without each head.

    Raises:
        LensError: examples without one class each.

    Example:
        >>> classifier = lens.load(transformers.ViTForImageClassification(vit.model.config).eval())
        >>> found = lens.heads.pruning.metrics(classifier, {"pixel_values": torch.randn(2, 3, 16, 16)}, [0, 1])
        >>> lens.figures.importance.classes_grid(found).data[0].z.shape
        (2, 8)
    """
    by_class = metrics.by_class(metric)
    values = np.stack([one.ravel() for one in by_class.values()])
    names = [f"L{layer}H{head}" for layer, head in np.ndindex(metrics.values(metric).shape)]
    row, column = np.unravel_index(values.argmax(), values.shape)
    labels = [str(label) for label in by_class]
    found = f"{metric} by class: class {labels[row]} loses most without {names[column]}, {values.max():.3g}"
    meta = {"metric": metric, "baseline": metrics.baseline, "model": metrics.model}
    figure = grid(values, found, look, unit=metric, signed=True, meta=meta)
    hover = "class %{y}, %{x}: %{z:.4g}<extra></extra>"
    figure.update_traces(x=names, y=labels, hovertemplate=hover)
    figure.update_xaxes(title="head", type="category", tickmode="auto", tickvals=None)
    return figure.update_yaxes(title="class", type="category", tickmode="auto", tickvals=None)
