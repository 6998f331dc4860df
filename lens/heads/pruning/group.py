"""`GroupAblation`: several heads taken away together."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import Result, Sentence, ends, few
from lens.heads.measures.scores import HeadScores, Intervention
from lens.stats import over_units
from lens.stats.verdicts import Verdict, verdict

_TOLD: dict[Verdict, tuple[str, str]] = {
    "above": (
        "understated",
        "single-head importance understates them: they stand in for each other",
    ),
    "below": (
        "overstated",
        "single-head importance counts them more than once: each needs the others",
    ),
    "not told apart": (
        "same",
        "single heads tell no more and no less than the group, as far as can be seen",
    ),
}
"""Where the interaction lies beside 0 -> kind and words."""


@dataclass(frozen=True, repr=False, eq=False)
class GroupAblation(Result):
    """What a group of heads is worth to a task, all replaced at once.

    Sign as in `HeadScores`: positive = without them the task goes worse.

    Attributes:
        heads: of the group.
        per_prompt: [prompt], loss of benefit of each prompt; float64.
        clean: [prompt], the metric of the model as it is.
        intervention: the full ablation configuration.
        metric: of the task; sign: its sign, -1 where less is better.
        task, model: their names.
    """

    heads: tuple[HeadId, ...]
    per_prompt: np.ndarray
    clean: np.ndarray
    intervention: Intervention
    metric: str
    sign: int
    task: str
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.per_prompt)

    @property
    def value(self) -> float:
        """Mean over the prompts."""
        return float(self.per_prompt.mean())

    @property
    def ablated(self) -> np.ndarray:
        """[prompt], the metric without the heads."""
        return self.clean - self.sign * self.per_prompt

    def interval(self, *, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of `value` over prompts; NaN for a single prompt."""
        low, high = over_units(self.per_prompt, np.ones(self.n), seed, shares=False)
        return float(low), float(high)

    def interaction(self, single: HeadScores) -> float:
        """`value` minus the sum of what the heads are worth alone.

        Positive: alone they look less important than they are together, as heads that stand in for
        each other do. Negative: they work one after the other, so that losing one is losing all.

        Raises:
            LensError: single heads measured in another way.
        """
        for name, mine, other in (
            ("method", "ablation", single.method),
            ("intervention", self.intervention, single.intervention),
            ("metric", self.metric, single.metric),
            ("task", self.task, single.task),
            ("model", self.model, single.model),
            ("clean", self.clean.tolist(), single.clean.tolist()),
        ):
            if mine != other:
                raise LensError(
                    f"the group and the single heads differ in {name}, so they cannot be compared; "
                    "measure both on the same task, model and baseline"
                )
        return self.value - float(sum(single.values[head] for head in self.heads))

    def interaction_interval(self, single: HeadScores, *, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of `interaction` over prompts, paired; NaN for a single prompt. Errors as there."""
        self.interaction(single)
        alone = np.sum([single.per_prompt[head] for head in self.heads], axis=0)
        low, high = over_units(self.per_prompt - alone, np.ones(self.n), seed, shares=False)
        return float(low), float(high)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row: `heads` ("L1H0, L1H3"), `value` with `low` and `high` (95 % bootstrap interval over prompts), `n`."""
        low, high = self.interval(seed=seed)
        heads = ", ".join(map(str, self.heads))
        row = {"heads": heads, "value": self.value, "low": low, "high": high, "n": self.n}
        return pd.DataFrame([row])

    def findings(self, single: HeadScores | None = None, *, seed: int = 0) -> tuple[Sentence, ...]:
        """What the group is worth ("worth"), or whether single heads understate or overstate it.

        By the interval of `interaction`: kind "understated", "overstated" or "same". Errors as in `interaction`.
        """
        worth = f"{self.value:.3g}{ends(*self.interval(seed=seed))}"
        if single is None:
            text = (
                f"Together {few(self.heads)} {'are' if len(self.heads) > 1 else 'is'} worth {worth} {self.metric} to "
                f"{self.task} ({self.clean.mean():.3g} with all heads, {self.ablated.mean():.3g} without, n = {self.n})."
            )
            return (Sentence(text, kind="worth"),)
        extra = self.interaction(single)
        low, high = self.interaction_interval(single, seed=seed)
        kind, told = _TOLD[verdict(low, high)]
        if np.isnan(low):
            told = "one prompt tells nothing of single heads beside the group"
        return (
            Sentence(
                f"Together {', '.join(map(str, self.heads))} are worth {worth} "
                f"({self.metric}), alone {self.value - extra:.3g} in sum (difference "
                f"{extra:+.3g}{ends(low, high, '+.3g')}, n = {self.n}); {told}.",
                kind=kind,
            ),
        )

    def __repr__(self) -> str:
        low, high = self.interval()
        return (
            f"GroupAblation({few(self.heads, joint='+')} by {self.intervention.baseline} on {self.task!r}, "
            f"{self.model}: {self.metric} {self.clean.mean():.3g} -> {self.ablated.mean():.3g}, "
            f"worth {self.value:.3g}{ends(low, high)}, {self.n} prompts)"
        )
