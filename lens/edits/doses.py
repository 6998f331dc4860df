"""What an edit is worth at each amount, and what it costs on held-out text, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, described
from lens.edits.side_effects import SideEffects, side_effects
from lens.models.loaded import LoadedModel
from lens.stats import over_units
from lens.tasks.task import Task
from lens.traces.recorder import capturing


@dataclass(frozen=True, eq=False)
class Dose(Result):
    """Gain on a task and side effects elsewhere, at the same amounts.

    Attributes:
        gains: [amount, prompt], improvement of the task's metric, whichever way it points (of a loss:
            nats per token that it falls).
        held_out: predictions of held-out text at each amount.
        metric, task: names.
    """

    gains: np.ndarray = field(repr=False)
    held_out: SideEffects
    metric: str
    task: str

    @property
    def amounts(self) -> tuple[float, ...]:
        """Of the edit, ascending."""
        return self.held_out.amounts

    def table(self) -> pd.DataFrame:
        """One row per amount: `gain` and the side effects with 95 % intervals over prompts.

        `n` counts prompts of the task, `held_out_n` those of the held-out text.
        """
        ones = np.ones(self.gains.shape[::-1])
        low, high = over_units(self.gains.T, ones, self.held_out.seed)
        side = self.held_out.table().rename(columns={"n": "held_out_n"})
        gain = pd.DataFrame(
            {
                "amount": self.amounts,
                "gain": self.gains.mean(1),
                "gain_low": low,
                "gain_high": high,
                "n": self.gains.shape[1],
            }
        )
        return gain.merge(side, on="amount", validate="one_to_one")

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """What the best amount gives (`gain`) and costs (`cost`)."""
        rows = self.table()
        best = rows.iloc[int(rows["gain"].to_numpy().argmax())]
        shown = f"{best['gain']:+.4f} [{best['gain_low']:+.4f}, {best['gain_high']:+.4f}]"
        helps = (
            "one prompt has no interval"
            if np.isnan(best["gain_low"])
            else "above 0"
            if best["gain_low"] > 0
            else "the interval holds 0 or less"
        )
        cost = f"{best['delta_loss']:+.4f} [{best['delta_loss_low']:+.4f}, {best['delta_loss_high']:+.4f}]"
        gain = (
            f"Of {len(rows)} amounts {best['amount']:g} gains most in {self.metric} of {self.task}: "
            f"{shown} on {int(best['n'])} prompts ({helps}). It was chosen on these prompts, which "
            "flatters it."
        )
        price = (
            f"On {int(best['held_out_n'])} held-out prompts that amount changes the loss by {cost} nats "
            f"per token and {best['flip_rate']:.1%} of the top tokens."
        )
        return Sentence(gain, kind="gain"), Sentence(price, kind="cost")


def dose(
    model: LoadedModel,
    task: Task | Any,
    edit: Callable[[float], AbstractContextManager[Any]],
    *,
    held_out: Any,
    amounts: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
) -> Dose:
    """Run a task and held-out text with the edit at each amount, and without it.

    Args:
        model: a causal language model.
        task: a `lens.tasks.Task`, or prompts as for `lens.capture`, whose loss is the metric.
        edit: amount -> context manager, such as
            `lambda amount: lens.edit(model, lens.edits.Move("first", amount=amount))`.
        held_out: prompts as for `lens.capture` that the edit is not meant for.
        amounts: each once.
        seed: of the bootstrap.

    Raises:
        LensError: as `side_effects`.

    Example:
        >>> lens.edits.dose(model, task, edit, held_out=texts).plot()
    """
    side = side_effects(model, held_out, edit, amounts=amounts, seed=seed)
    if not isinstance(task, Task):
        found = side_effects(model, task, edit, amounts=amounts, seed=seed)
        return Dose(-found.values["delta_loss"], side, "loss", "the prompts")
    with capturing(model, statistics=()):  # the same kernel: nothing but the edit differs
        clean = task.evaluate(model)
    gains = []
    for amount in side.amounts:
        with edit(amount):
            edited = task.evaluate(model)
        gains.append((task.sign * (edited - clean)).double().numpy())
    return Dose(np.stack(gains), side, task.metric, task.name)
