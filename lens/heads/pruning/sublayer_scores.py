"""Results of `lens.heads.sublayers`: what each sub-layer is worth, how many can go, how far a layer moves the stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.results import Result, Sentence, few
from lens.stats.intervals import columns
from lens.stats.verdicts import (
    clear_told,
    leave_out_0,
    mean_told,
    of_many,
    of_many_told,
    rivals,
)

_ROUNDING = 1e-5  # of the metric: what single precision makes of nothing


@dataclass(frozen=True, repr=False, eq=False)
class SkipSweep(Result):
    """Each sub-layer left out alone: two numbers of each prompt.

    Attributes:
        names: `L0.attention`, `L0.mlp`, ...
        drops: [sub-layer, prompt], positive = the task goes worse without it, in units of the metric.
        distances: [sub-layer, prompt] between the outputs with it and without it (`lens.heads.sublayers.distances`).
        clean: [prompt], the metric of the whole model.
        distance, metric, task, model: names.
    """

    names: tuple[str, ...]
    drops: np.ndarray
    distances: np.ndarray
    clean: np.ndarray
    distance: str
    metric: str
    task: str
    model: str

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per sub-layer, in order: `name`, `drop`, `drop_low`, `drop_high`, `distance`,
        `distance_low`, `distance_high` (95 % bootstrap intervals over prompts) and `n`."""
        ends = columns("drop", self.drops, seed, shares=False) | columns(
            "distance", self.distances, seed
        )
        return pd.DataFrame({"name": list(self.names), **ends, "n": len(self.clean)})

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """The sub-layer that is missed most, beside the median one ("most", or "none" where its interval, of the highest of
        many, holds 0), and how many are told apart from nothing ("chance")."""
        table, worst = self.table(seed=seed), int(self.drops.mean(1).argmax())
        row, many = table.iloc[worst], len(table)
        told = (
            f"{self.names[worst]} {self.metric} is worse by {of_many_told(row, 'drop', '.3g', many, len(self.clean))} (on {self.task}, "
            f"n = {len(self.clean)}), without the median sub-layer by {table['drop'].median():.3g}"
        )
        rounding = _ROUNDING * np.abs(self.clean).max()
        low, _ = of_many(row["drop"], row["drop_low"], row["drop_high"], many, len(self.clean))
        if not (low > 0 and row["drop"] > rounding):
            text = f"No sub-layer is told apart from none as the most missed of {many}: without {told}."
            return (Sentence(text, kind="none"),)
        alike = [self.names[at] for at in rivals(self.drops, worst, seed)]
        beside = f"; not told apart from {few(alike)}" if alike else ""
        clear = leave_out_0(table["drop_low"], table["drop_high"])
        apart = int((clear & (table["drop"].abs() > rounding)).sum())
        return (
            Sentence(f"Without {told}{beside}.", kind="most"),
            Sentence(f"{clear_told(apart, many, 'sub-layers')}.", kind="chance"),
        )

    def __repr__(self) -> str:
        drops = self.drops.mean(1)
        most, least = int(drops.argmax()), int(drops.argmin())
        return (
            f"SkipSweep({self.task!r}, {self.model}: {len(self.names)} sub-layers, "
            f"{len(self.clean)} prompts; {self.metric} {self.clean.mean():.3g}, worth most "
            f"{self.names[most]} {drops[most]:.3g}, least {self.names[least]} {drops[least]:.3g})"
        )


@dataclass(frozen=True, repr=False, eq=False)
class GreedyRemoval(Result):
    """Sub-layers taken out one after the other, each time the one that is missed least.

    Attributes:
        order: names, first the one taken out first.
        distances: [step, prompt] from the whole model after each step.
        losses: [step + 1, prompt] the task's metric, that of the whole model first.
        sublayers: how many the model has.
        distance, metric, task, model: names.
    """

    order: tuple[str, ...]
    distances: np.ndarray
    losses: np.ndarray
    sublayers: int
    distance: str
    metric: str
    task: str
    model: str

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per step: `removed` (how many), `name` (the last, "" at first), `metric`, `low`,
        `high` (95 % bootstrap interval over prompts), `distance` and `n`."""
        return pd.DataFrame(
            {
                "removed": np.arange(len(self.losses)),
                "name": ["", *self.order],
                **columns("metric", self.losses, seed, plain=True, shares=False),
                "distance": [0.0, *self.distances.mean(1)],
                "n": self.losses.shape[1],
            }
        )

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """What the metric changes by without all that were taken out ("removal")."""
        change = mean_told(self.losses[-1] - self.losses[0], seed, "+.3g")
        return (
            Sentence(
                f"Without {few(self.order)}, {len(self.order)} of {self.sublayers} sub-layers, taken out in this order by "
                f"{self.distance} of the outputs, the {self.metric} changes by {change} from {self.losses[0].mean():.3g} "
                f"(paired, n = {self.losses.shape[1]}); the order was chosen on these prompts.",
                kind="removal",
            ),
        )

    def __repr__(self) -> str:
        shown = ", ".join(self.order[:4]) + (", ..." if len(self.order) > 4 else "")
        return (
            f"GreedyRemoval({self.distance} on {self.task!r}, {self.model}: {shown}; {self.metric} "
            f"{self.losses[0].mean():.3g} -> {self.losses[-1].mean():.3g} without "
            f"{len(self.order)} of {self.sublayers} sub-layers)"
        )


@dataclass(frozen=True, repr=False, eq=False)
class BlockInfluence(Result):
    """How much each layer turns the residual stream.

    Attributes:
        per_prompt: [layer, prompt], mean over positions of `1 - cos(stream before, stream after)`.
        task, model: names.
    """

    per_prompt: np.ndarray
    task: str
    model: str

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per layer: `layer`, `influence`, `low`, `high` (95 % bootstrap over prompts), `n`."""
        layers, n = self.per_prompt.shape
        ends = columns("influence", self.per_prompt, seed, plain=True)
        return pd.DataFrame({"layer": np.arange(layers), **ends, "n": n})

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """The layer that turns the stream least, beside the median one ("least")."""
        table, least = self.table(seed=seed), int(self.per_prompt.mean(1).argmin())
        layers, n = self.per_prompt.shape
        told = of_many_told(
            table.iloc[least], "influence", ".3g", layers, n, plain=True, least=0, most=2
        )
        alike = [f"L{at}" for at in rivals(-self.per_prompt, least, seed)]
        beside = f"; not told apart from {few(alike)}" if alike else ""
        return (
            Sentence(
                f"Layer {least} turns the residual stream least: 1 - cosine "
                f"{told} (the lowest of {layers}, n = {n}), the median layer "
                f"{table['influence'].median():.3g}{beside}.",
                kind="least",
            ),
        )

    def __repr__(self) -> str:
        shown = ", ".join(f"L{at} {value:.3g}" for at, value in enumerate(self.per_prompt.mean(1)))
        return f"BlockInfluence({self.task!r}, {self.model}: {shown})"
