"""`HeadScores`: what each head is worth to a task, with the configuration that says what was done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence
from lens.stats.intervals import columns
from lens.stats.verdicts import clear_told, leave_out_0, of_many, of_many_told

_MANY_PROMPTS = 10  # of fewer, each is more than a tenth of their mean
_ESTIMATE = "It is an estimate to first order; method='ablation' measures it."
_LIMITS = {
    "ablation": "One head is out at a time, so that what others make up for does not show.",
    "gradient": _ESTIMATE,
    "attribution": _ESTIMATE,
    "atp": _ESTIMATE,
    "direct": "It is what heads write straight into the logits, without what later layers make of it.",
}


@dataclass(frozen=True)
class Intervention:
    """What is put in place of a head, in the terms in which such numbers are compared.

    Attributes:
        baseline: "zero"; "mean" over the prompts at each position, its own among them (`own_share`);
            "pooled_mean" over prompts and positions together; "resample", another prompt's output drawn by
            `seed`; "counterfactual", that of the corrupt prompt; "optimal", the constant (one for all
            positions) with which the metric stays best.
        seed: of the draw, None where nothing is drawn.
        fitted_on: numbers of the prompts that the optimal constant was fitted to; the others, in
            their order, are the scored ones. None where nothing is fitted and all are scored.
        steps: of that fit.
        grad_drop: whether the gradient of one layer after another was blocked (AtP*).
        granularity: "head output before the output projection"; of direct logit attribution, only
            the path from there to the logits.
        positions: always "all".
        direction: always "noising": clean run, baseline put in.
        ablated: always "the named heads"; the rest of the model runs on.
        aggregation: always "mean over prompts of the difference".
    """

    baseline: str
    seed: int | None = None
    fitted_on: tuple[int, ...] | None = None
    steps: int | None = None
    grad_drop: bool = False
    granularity: str = "head output before the output projection"
    positions: str = "all"
    direction: str = "noising"
    ablated: str = "the named heads"
    aggregation: str = "mean over prompts of the difference"

    def own_share(self, n: int) -> str:
        """What is to be said of a "mean" over few prompts, of which each prompt's own output is a part; else ""."""
        if self.baseline != "mean" or n >= _MANY_PROMPTS:
            return ""
        return (
            f"The mean over {n} prompts that stands in for a head is to 1/{n} the prompt's own output, so that what is "
            "lost is understated; take more prompts, or baseline='pooled_mean'."
        )


@dataclass(frozen=True, repr=False, eq=False)
class HeadScores(Result):
    """Importance of every head for a task.

    Sign: positive = ablating the head makes the task worse, in units of the metric, whichever way
    the metric points. With `absolute` the sign is gone, and only the order of size is left.

    Attributes:
        per_prompt: [layer, head, prompt], the score of each prompt; float64; NaN in layers without
            softmax attention, which have no row in tables.
        clean: [prompt], the metric of the model as it is.
        method: "ablation" (measured), "gradient" or "attribution" (first-order estimates of it), "direct"
            (what the head writes straight into the logits).
        intervention: the full ablation configuration.
        absolute: None, "prompt" or "token": where absolute values were taken (Michel et al.).
        metric: of the task; sign: its sign, -1 where less is better.
        task, model: their names.
    """

    per_prompt: np.ndarray
    clean: np.ndarray
    method: str
    intervention: Intervention
    metric: str
    sign: int
    task: str
    model: str
    absolute: str | None = None

    def __post_init__(self) -> None:
        if self.per_prompt.ndim != 3 or self.per_prompt.shape[2] != len(self.clean):
            raise LensError(
                f"per_prompt must be [layer, head, prompt] with {len(self.clean)} prompts, got the "
                f"shape {list(self.per_prompt.shape)}"
            )

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.per_prompt.shape[2]

    @property
    def values(self) -> np.ndarray:
        """[layer, head] mean over the prompts."""
        return self.per_prompt.mean(-1)

    @property
    def stderr(self) -> np.ndarray:
        """[layer, head] standard error of `values` over prompts; NaN for a single prompt."""
        if self.n < 2:
            return np.full(self.per_prompt.shape[:2], np.nan)
        return self.per_prompt.std(-1, ddof=1) / np.sqrt(self.n)

    @property
    def label(self) -> str:
        """How it was measured, for axes and tables: `ablation (mean)`, `gradient (absolute per token)`."""
        if self.method == "gradient":
            return self.method + (f" (absolute per {self.absolute})" if self.absolute else "")
        alone = self.method in ("direct", "gate")
        return self.method if alone else f"{self.method} ({self.intervention.baseline})"

    @property
    def names(self) -> list[str]:
        """`L0H0`, `L0H1`, ... of the layers that have heads."""
        return head_columns(self._places)["name"]

    @property
    def rows(self) -> np.ndarray:
        """[head, prompt] in the order of `names`."""
        return self.per_prompt[tuple(self._places.T)]

    @property
    def _places(self) -> np.ndarray:
        """[heads, 2]: layer and head of each row."""
        return np.argwhere(~np.isnan(self.per_prompt).all(-1))

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head, most important first.

        Columns: `name`, `layer`, `head`, `value`, `stderr`, `low`, `high` (95 % bootstrap interval
        over prompts, draws by `seed`; NaN for one prompt), `n`.
        """
        value = columns("value", self.rows, seed, plain=True, shares=False)
        rows = pd.DataFrame(head_columns(self._places) | value | {"n": self.n})
        rows.insert(4, "stderr", self.stderr[tuple(self._places.T)])
        return rows.sort_values("value", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """The heads that are worth most ("top", or "none" where the interval of the highest of all holds 0), how many
        intervals leave out 0 ("told"), what it does not show ("limit")."""
        table = self.table()
        many, least = len(table), 0 if self.absolute else -np.inf
        rows = table[table["value"] > 0].head(3).to_dict("records") or [table.iloc[0]]
        best = ", ".join(
            f"{row['name']} {of_many_told(row, 'value', '.3g', many, self.n, plain=True, least=least)}"
            for row in rows
        )
        first = rows[0]
        low, _ = of_many(first["value"], first["low"], first["high"], many, self.n)
        none = not first["value"] > 0 or (low <= 0 and not self.absolute)
        of = f"the highest of {many}, by {self.label}, in units of {self.metric}, n = {self.n}"
        told = f"Worth most to {self.task}: {best} ({of})."
        if none:
            told = f"No head is told to be worth anything to {self.task}: {best} ({of})."
        said = [Sentence(told, kind="none" if none else "top")]
        if self.n > 1 and not self.absolute:
            apart = int(leave_out_0(table["low"], table["high"]).sum())
            text = f"{clear_told(apart, len(table), 'heads')}."
            said.append(Sentence(text, kind="told"))
        limits = _LIMITS.get(self.method, ""), self.intervention.own_share(self.n)
        return (*said, *(Sentence(limit, kind="limit") for limit in limits if limit))

    def top(self, count: int = 10) -> list[HeadId]:
        """The most important heads, first the most important one.

        Raises:
            LensError: not a number of heads that the model has.
        """
        places = self._places
        total = len(places)
        if not (is_whole(count) and 1 <= count <= total):
            raise LensError(f"top takes 1 to {total} heads of {self.model}, got {count}")
        order = np.argsort(-self.values[tuple(places.T)], kind="stable")[:count]
        return [HeadId(*place) for place in places[order].tolist()]

    def __repr__(self) -> str:
        values = self.values
        shown = ", ".join(
            f"{head} {values[head]:.3g}" for head in self.top(min(3, len(self.names)))
        )
        heads = values.shape[1]
        layers = len(self.names) // heads
        return (
            f"HeadScores({self.label} on {self.task!r}, {self.model}: {layers} × {heads} heads, "
            f"{self.n} prompts, {self.metric} {self.clean.mean():.3g} clean; top {shown})"
        )
