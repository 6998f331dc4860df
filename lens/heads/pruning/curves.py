"""What a model loses when heads are taken away one after another, run for real.

>>> scores = lens.heads.importance(small, copying)
>>> lens.heads.pruning.curve(small, copying, order=scores, draws=2).plot()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.checked import checked
from lens.common.choices import Seed, check_counts, is_number
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId
from lens.common.results import Result, Sentence, counted, with_ends
from lens.heads.measures.scores import HeadScores, Intervention
from lens.heads.pruning.groups import ablate_each
from lens.stats.intervals import columns

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel
    from lens.tasks.task import Task


AS_GIVEN = "as given"


@dataclass(frozen=True, repr=False, eq=False)
class PruningCurve(Result):
    """The metric after each step of taking heads away together.

    Attributes:
        removed: [step], how many heads are gone; 0 first.
        order: the heads, first removed first.
        per_prompt: [step, prompt], the metric; float64.
        random: [draw, step, prompt], the same in random orders.
        ranking: what the order came from.
        intervention: the full ablation configuration.
        metric: of the task; sign: its sign, -1 where less is better.
        task, model: their names.
    """

    removed: np.ndarray
    order: tuple[HeadId, ...]
    per_prompt: np.ndarray
    random: np.ndarray
    ranking: str
    intervention: Intervention
    metric: str
    sign: int
    task: str
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.per_prompt.shape[1]

    @property
    def going(self) -> str:
        """The order in words, such as "most redundant first"."""
        return self.ranking if self.ranking == AS_GIVEN else f"{self.ranking} first"

    @property
    def values(self) -> np.ndarray:
        """[step] mean of the metric over the prompts."""
        return self.per_prompt.mean(1)

    @property
    def cost(self) -> np.ndarray:
        """[step, prompt] loss of benefit against the whole model; positive = worse."""
        return self.sign * (self.per_prompt[0] - self.per_prompt)

    def prunable(self, cost: float) -> tuple[HeadId, ...]:
        """The longest beginning of the order that costs at most `cost` at every step, on the mean.

        Args:
            cost: in units of the metric.

        Raises:
            LensError: no number.
        """
        if not is_number(cost):
            raise LensError(f"cost must be a number, in units of the metric, got {cost!r}")
        over = np.flatnonzero(self.cost.mean(1) > cost)
        last = len(self.removed) - 1 if not len(over) else over[0] - 1
        return self.order[: int(self.removed[last])] if last >= 0 else ()

    @checked
    def beside(self, other: PruningCurve) -> PruningCurve:
        """The same with the random orders of another curve of these prompts and heads."""
        return replace(self, random=other.random)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per step.

        Columns: `removed`, `name` (the last one removed), `value`, `cost`, `low` and `high` (95 %
        bootstrap interval of the cost over prompts, NaN for one), `random_cost` (mean over random
        orders), `random_low` and `random_high` (the lowest and highest of them; NaN without), `n`.
        """
        nothing = np.full(len(self.removed), np.nan)
        random = self.sign * (self.per_prompt[0] - self.random).mean(2)  # [draw, step]
        has = len(random) > 0
        return pd.DataFrame(
            {
                "removed": self.removed,
                "name": ["", *(str(self.order[count - 1]) for count in self.removed[1:])],
                "value": self.values,
                **columns("cost", self.cost, seed, plain=True, shares=False),
                "random_cost": random.mean(0) if has else nothing,
                "random_low": random.min(0) if has else nothing,
                "random_high": random.max(0) if has else nothing,
                "n": self.n,
            }
        )

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """What the first half of the order costs, beside as many heads in random orders ("cost")."""
        table = self.table(seed=seed)
        half = table.iloc[len(table) // 2]
        draws = len(self.random)
        random = f"; as many in {counted(draws, 'random order')} {half['random_cost']:.3g} on the mean ({half['random_low']:.3g} to {half['random_high']:.3g})"
        return (
            Sentence(
                f"The first {half['removed']} of {len(self.order)} heads, {self.going}, cost "
                f"{with_ends(half, 'cost', plain=True)} of {self.metric} on {self.task} (n = {self.n}){random * bool(draws)}.",
                kind="cost",
            ),
        )

    def __repr__(self) -> str:
        table = self.table()
        half = table.iloc[len(table) // 2]
        beside = "" if np.isnan(half["random_cost"]) else f", {half['random_cost']:.3g} at random"
        return (
            f"PruningCurve({self.ranking}, {self.intervention.baseline} on {self.task!r}, "
            f"{self.model}: {self.metric} {self.values[0]:.3g} whole; {half['removed']} of "
            f"{len(self.order)} heads cost {with_ends(half, 'cost', plain=True)}{beside}; {self.n} prompts)"
        )


def curve(
    model: LoadedModel,
    task: Task,
    *,
    order: HeadScores | pd.DataFrame | Sequence[AnyHead],
    baseline: str = "mean",
    steps: int | None = None,
    draws: int = 8,
    seed: Seed = 0,
    progress: bool = True,
) -> PruningCurve:
    """Remove heads in an order, cumulatively, and measure the task after each step.

    Use other prompts here than those that the order came from: an order looks better on its own.

    Args:
        model: as `lens.load` returns it.
        task: prompts and metric.
        order: scores (least important first; an estimate of first order by its size, as its sign is no
            promise that the model gets better), the table of `HeadSimilarity.redundancy` (most redundant
            first; not-scored heads last), or heads in the order in which they go.
        baseline: what stands in for a removed head, as in `lens.heads.importance`.
        steps: measure at most so many points, evenly spread, all heads gone the last; None: each.
        draws: random orders to compare with.
        seed: of the random orders, and of the draw of "resample".
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Example:
        >>> task = lens.tasks.induction(small, n=4)
        >>> scores = lens.heads.importance(small, task, method="gradient")
        >>> found = lens.heads.pruning.curve(small, task, order=scores, steps=2, draws=0)
        >>> found.removed.tolist()
        [0, 4, 8]

    Reference: Michel, Levy, Neubig, Are Sixteen Heads Really Better than One?, 2019, arXiv 1905.10650.

    Raises:
        LensError: an order of another model, that names a head twice or none, no steps, or what
            `lens.heads.importance` refuses.
    """

    heads, ranking = _order(model, order)
    check_counts(0, draws=draws)
    if steps is not None:
        check_counts(steps=steps)
    count = len(heads) if steps is None else min(steps, len(heads))
    removed = np.unique(np.linspace(0, len(heads), count + 1).round().astype(int))
    random = np.random.default_rng(seed)
    orders = [heads, *([heads[i] for i in random.permutation(len(heads))] for _ in range(draws))]
    gone = [one[:count] for one in orders for count in removed[1:]]
    parts = ablate_each(model, task, groups=gone, baseline=baseline, seed=seed, progress=progress)
    first = parts[0]
    found = np.stack([part.ablated for part in parts]).reshape(len(orders), -1, first.n)
    whole = np.broadcast_to(first.clean, (len(orders), 1, first.n))
    curves = np.concatenate([whole, found], 1)
    return PruningCurve(
        removed=removed,
        order=tuple(heads),
        per_prompt=curves[0],
        random=curves[1:],
        ranking=ranking,
        intervention=first.intervention,
        metric=task.metric,
        sign=task.sign,
        task=task.name,
        model=model.name,
    )


def _order(
    model: LoadedModel, order: HeadScores | pd.DataFrame | Sequence[AnyHead]
) -> tuple[list[HeadId], str]:
    """Heads in the order in which they go, and what the order is called."""
    info = model.info
    if isinstance(order, HeadScores):
        if order.values.shape != (info.layers, info.heads):
            raise LensError(
                f"the scores are of {order.model} with layers × heads {order.values.shape}, "
                f"{model.name} has {(info.layers, info.heads)}; score this model"
            )
        measured = order.method == "ablation"
        values = order.values if measured else np.abs(order.values)
        label = order.label if measured else f"size of {order.label}"
        heads = sorted(info.every_head, key=lambda head: values[head])
        return heads, f"least by {label} on {order.task}"
    if isinstance(order, pd.DataFrame):
        if not {"name", "value", "nearest"} <= set(order):
            raise LensError(
                "a table is an order where it is that of HeadSimilarity.redundancy(), with the columns name, value and "
                f"nearest; got {', '.join(map(str, order))}. Give scores themselves, or heads in the order in which they go"
            )
        ranked = order.sort_values("value", ascending=False, kind="stable", na_position="last")
        names, ranking = ranked["name"].tolist(), "most redundant"
    else:
        names, ranking = list(order), AS_GIVEN
    heads = [info.head(head) for head in names]
    if not heads:
        raise LensError("the order names no heads; give at least one")
    if twice := sorted({str(head) for head in heads if heads.count(head) > 1}):
        raise LensError(f"{', '.join(twice)} is named twice in the order; name each head once")
    return heads, ranking
