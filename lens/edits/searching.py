"""Which heads an edit helps, chosen on some prompts and judged on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from lens.common.choices import Seed, check_between, is_whole
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, few, with_ends
from lens.edits.language import OfHeads
from lens.edits.running import edit as run
from lens.models.loaded import LoadedModel
from lens.stats import over_units
from lens.tasks.task import Task


@dataclass(frozen=True, repr=False, eq=False)
class HeadSearch(Result):
    """Heads chosen on validation prompts, and what they are worth on test prompts.

    Positive numbers are improvements of the task's metric, whichever way it points.

    Attributes:
        gains: [layer, head, validation prompt], gain of editing that head alone.
        chosen: heads with the largest mean gain above 0, largest first.
        validation, test: [prompts], gain of editing all chosen heads together; 0 where none are.
        everywhere: [test prompts], gain of editing all heads, for comparison.
        metric, task, model: names.
        seed: of the split and the bootstrap.
    """

    gains: np.ndarray = field(repr=False)
    chosen: tuple[HeadId, ...]
    validation: np.ndarray = field(repr=False)
    test: np.ndarray = field(repr=False)
    everywhere: np.ndarray = field(repr=False)
    metric: str
    task: str
    model: str
    seed: int

    @property
    def bias(self) -> float:
        """Mean gain on the validation prompts minus that on the test prompts: what choosing flatters."""
        return float(self.validation.mean() - self.test.mean())

    def table(self) -> pd.DataFrame:
        """One row per head, largest gain first: `gain` with 95 % interval over prompts, `chosen`, `n`."""
        places = np.argwhere(~np.isnan(self.gains).all(-1))
        gains = self.gains[tuple(places.T)]
        low, high = over_units(gains.T, np.ones_like(gains.T), self.seed, shares=False)
        names = [HeadId(*place) for place in places.tolist()]
        rows = pd.DataFrame(
            {
                "layer": [name.layer for name in names],
                "head": [name.head for name in names],
                "name": [str(name) for name in names],
                "gain": gains.mean(-1),
                "gain_low": low,
                "gain_high": high,
                "chosen": [name in self.chosen for name in names],
                "n": gains.shape[1],
            }
        )
        return rows.sort_values("gain", ascending=False, kind="stable", ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Gain with a 95 % interval over prompts: chosen heads on both sets, and all heads on the test set."""
        rows = []
        for heads, prompts, values in (
            ("chosen", "validation", self.validation),
            ("chosen", "test", self.test),
            ("all", "test", self.everywhere),
        ):
            low, high = over_units(values, np.ones(len(values)), self.seed, shares=False)
            rows.append(
                {
                    "heads": heads,
                    "prompts": prompts,
                    "gain": values.mean(),
                    "gain_low": float(low),
                    "gain_high": float(high),
                    "n": len(values),
                }
            )
        return pd.DataFrame(rows)

    def findings(self) -> tuple[Sentence, ...]:
        """What was `chosen`, what it is worth (`gain`), and whether that is shown (`verdict`)."""
        gains = self.gains[~np.isnan(self.gains).all(-1)]
        heads, prompts = gains.shape
        if not self.chosen:
            text = (
                f"No head of {self.model} helps {self.task!r} when it is edited alone: the largest gain "
                f"of {heads} heads on {prompts} validation prompts is {gains.mean(-1).max():.4f} "
                f"({self.metric})."
            )
            return (Sentence(text, kind="chosen"),)
        rows = self.summary().to_dict("records")
        shown = [with_ends(row, "gain", ".4f") for row in rows]
        chosen = (
            f"{len(self.chosen)} of {heads} heads were chosen on {prompts} validation prompts: "
            f"{few(self.chosen)}."
        )
        gain = (
            f"Edited together they gain {shown[1]} in {self.metric} on {rows[1]['n']} test prompts and "
            f"{shown[0]} on those that chose them: choosing flatters by {self.bias:.4f}. All heads "
            f"together gain {shown[2]}."
        )
        verdict = (
            "The gain on the test prompts is above 0."
            if rows[1]["gain_low"] > 0
            else "The interval on the test prompts holds 0 or less: these prompts do not show that the "
            "chosen heads help."
        )
        return (
            Sentence(chosen, kind="chosen"),
            Sentence(gain, kind="gain"),
            Sentence(verdict, kind="verdict"),
        )


def search_heads(
    model: LoadedModel,
    task: Task,
    edit: OfHeads,
    *,
    most: int = 10,
    validation: float = 0.5,
    seed: Seed = 0,
    progress: bool = True,
) -> HeadSearch:
    """Edit each head alone on validation prompts, choose the best, judge them on the others.

    One pass over the validation prompts per head. The test prompts are never used to choose.

    Args:
        model, task: the prompts are split at random by `seed`.
        edit: of attention, such as `lens.edits.Move("first", amount=0.6)`; its heads are tried one by one.
        most: heads chosen at most; only those with a positive mean gain are.
        validation: share of the prompts that choose.
        seed: of the split and the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an edit that is not one of heads, or that names some; fewer than two prompts on a side,
            or `most` below 1.

    Reference:
        The offline search of ACT (arXiv 2406.15765) and PASTA (arXiv 2311.02262).

    Example:
        >>> lens.edits.search_heads(model, task, lens.edits.Mask("first"), most=3).findings()
    """
    info = model.info
    if not isinstance(edit, OfHeads):
        raise LensError(
            f"search_heads tries an edit of attention, such as lens.edits.Mask('first'), got {edit!r}"
        )
    if edit.heads is not None or edit.layers is not None:
        raise LensError(
            "search_heads chooses the heads itself: leave heads and layers of the edit out"
        )
    if not is_whole(most) or most < 1:
        raise LensError(f"most must be at least one head, got {most}")
    choosing, judging = _parted(task, validation, seed)
    base, base_test = (part.evaluate(model) for part in (choosing, judging))

    def gain(part: Task, clean: torch.Tensor, heads: Sequence[HeadId]) -> np.ndarray:
        if not heads:
            return np.zeros(part.n)
        with run(model, replace(edit, heads=heads)):
            edited = part.evaluate(model)
        return (part.sign * (edited - clean)).double().numpy()

    everyone, found = info.every_head, []
    with advancing(f"{model.name}: heads", len(everyone), progress) as advance:
        for head in everyone:
            found.append(gain(choosing, base, [head]))
            advance(1)
    gains = np.stack(found)
    means = gains.mean(-1)
    best = [index for index in np.argsort(-means, kind="stable")[:most] if means[index] > 0]
    chosen = tuple(everyone[index] for index in best)
    return HeadSearch(
        gains=info.by_layer(gains.reshape(len(info.attending), info.heads, -1)),
        chosen=chosen,
        validation=gain(choosing, base, chosen),
        test=gain(judging, base_test, chosen),
        everywhere=gain(judging, base_test, everyone),
        metric=task.metric,
        task=task.name,
        model=model.name,
        seed=seed,
    )


def _parted(task: Task, validation: float, seed: int) -> tuple[Task, Task]:
    """The task on the prompts that choose, and on those that judge."""
    check_between(0, 1, validation=[validation])
    count = round(validation * task.n)
    if not 2 <= count <= task.n - 2:
        raise LensError(
            f"validation={validation} of {task.n} prompts leaves {count} to choose with and "
            f"{task.n - count} to judge by; each side needs two"
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(task.n))
    first, second = order.split([count, task.n - count])
    return task.take(first.sort().values), task.take(second.sort().values)
