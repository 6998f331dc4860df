"""Several orders in which heads could go, run for real on the same prompts, beside random ones.

Which heads can go depends on the order in which they go. An order by a first-order score may be worse
than a random one, and then it says nothing about what the model can do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import Seed, is_number
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.results import Result, Sentence, counted, with_ends
from lens.heads.measures.scores import HeadScores
from lens.heads.pruning.curves import PruningCurve, curve

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel
    from lens.tasks.task import Task

_BEARABLE = 0.05


@dataclass(frozen=True, repr=False, eq=False)
class PruningOrders(Result):
    """The curves of several orders on the same prompts.

    Attributes:
        curves: one for each order; all have the same random orders beside them.
        bearable: cost, as a share of the whole model's metric, up to which heads are said to go.
    """

    curves: tuple[PruningCurve, ...]
    bearable: float

    @property
    def limit(self) -> float:
        """The bearable cost in units of the metric."""
        return self.bearable * abs(float(self.curves[0].values[0]))

    @property
    def best(self) -> PruningCurve:
        """The order in which most heads can go; of several, the one that costs least over all steps."""
        return max(
            self.curves,
            key=lambda one: (len(one.prunable(self.limit)), -float(one.cost.mean())),
        )

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per order and step: `order`, and the columns of `PruningCurve.table`."""
        tables = [one.table(seed=seed).assign(order=one.ranking) for one in self.curves]
        table = pd.concat(tables, ignore_index=True)
        return table[["order", *table.columns.drop("order")]]

    def findings(self) -> tuple[Sentence, ...]:
        """Kinds: `prunable` (by the best order), `order` (each of the others), `worse_than_random`, `limit`."""
        best, total = self.best, len(self.best.order)
        spared = len(best.prunable(self.limit))
        tried = (
            f"the best of {len(self.curves)} orders tried" if len(self.curves) > 1 else "as asked"
        )
        said = [
            Sentence(
                f"{spared} of {total} heads can go, {best.going} ({tried}), before the "
                f"{best.metric} on these prompts of {best.task} is more than {self.bearable:.0%} "
                f"worse{_cost(best, spared)}.",
                kind="prunable",
            )
        ]
        for one in self.curves:
            if one is not best:
                count = len(one.prunable(self.limit))
                text = f"Going {one.going}, {count} of {total} can."
                said.append(Sentence(text, kind="order"))
        table = best.table()
        step = table[table["removed"] == spared].iloc[0]
        if best.n == 1:
            text = (
                "Of one prompt there is no interval, so that how many can go is not told for sure."
            )
            said.append(Sentence(text, kind="limit"))
        if spared and step["high"] > self.limit:
            text = (
                f"How many can go is not told for sure: of {spared} the interval reaches to {step['high']:.3f}, "
                f"beyond the {self.limit:.3f} that may be lost."
            )
            said.append(Sentence(text, kind="limit"))
        for one in self.curves:
            random, own = _areas(one), float(one.cost[1:-1].mean()) if len(one.cost) > 2 else np.nan
            if len(random) and own > random.max():
                text = (
                    f"Going {one.going} is worse than at random: it costs {own:.3g} on the mean "
                    f"over all steps, {len(random)} random orders {random.mean():.3g} "
                    f"({random.min():.3g} to {random.max():.3g})."
                )
                said.append(Sentence(text, kind="worse_than_random"))
        if text := best.intervention.own_share(best.n):
            said.append(Sentence(text, kind="limit"))
        return tuple(said)


def orders(
    model: LoadedModel,
    task: Task,
    *,
    orders: Sequence[HeadScores | pd.DataFrame | Sequence[AnyHead]],
    baseline: str = "mean",
    bearable: float = _BEARABLE,
    steps: int | None = None,
    draws: int = 8,
    seed: Seed = 0,
    progress: bool = True,
) -> PruningOrders:
    """`curve` for several orders: how many heads can go by the best of them, and which are no better than chance.

    Choosing the best of several on one set of prompts flatters it a little; the other orders and the
    random ones stand beside it.

    Args:
        model, task, baseline, steps, draws, seed, progress: as in `curve`; the random orders are shared.
        orders: each as in `curve`.
        bearable: cost, as a share of the whole model's metric, up to which heads are said to go.

    Example:
        >>> task = lens.tasks.induction(small, n=4)
        >>> scores = [lens.heads.importance(small, task, method=by) for by in ("ablation", "gradient")]
        >>> found = lens.heads.pruning.orders(small, task, orders=scores, draws=2)
        >>> print(*found.findings())
        3 of 8 heads can go...

    Raises:
        LensError: no order, a share that is not positive, and as in `curve`.
    """

    if not len(orders):
        raise LensError("orders is empty; give at least one, such as heads.importance(...)")
    if not (is_number(bearable) and 0 < bearable < np.inf):
        raise LensError(f"bearable must be a share above 0 such as 0.05, got {bearable}")
    curves: list[PruningCurve] = []
    for order in orders:
        found = curve(
            model,
            task,
            order=order,
            baseline=baseline,
            steps=steps,
            draws=0 if curves else draws,
            seed=seed,
            progress=progress,
        )
        curves.append(found if not curves else found.beside(curves[0]))
    return PruningOrders(tuple(curves), bearable)


def _areas(one: PruningCurve) -> np.ndarray:
    """[draw] mean cost of each random order over the steps between none and all."""
    cost = one.sign * (one.per_prompt[0] - one.random)
    return cost[:, 1:-1].mean((1, 2)) if cost.shape[1] > 2 else np.empty(0)


def _cost(one: PruningCurve, removed: int) -> str:
    if not removed:
        return ", so not even the first"
    table = one.table()
    last = table.loc[table["removed"] == removed].iloc[0]
    random = (
        ""
        if np.isnan(last["random_cost"])
        else f", and by {last['random_cost']:.3f} ({last['random_low']:.3f} to {last['random_high']:.3f}) "
        f"without as many in {counted(len(one.random), 'random order')}"
    )
    whole = abs(float(one.values[0]))
    share = f" ({last['cost'] / whole:+.1%})" if whole else ""
    return f": it is then worse by {with_ends(last, 'cost', '.3f', plain=True)}{share}{random}"
