"""Heads that estimates put first, taken away for real: what is estimated is not told as what was lost."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.head_ids import HeadId
from lens.common.results import ends
from lens.heads.measures.scores import HeadScores
from lens_analyses.steps.subject import Subject

if TYPE_CHECKING:
    from lens.tasks import Task

_RANDOM = 4  # heads beside those that are first
COLUMNS = {
    "task": "What was measured.",
    "by": "The estimate that puts the head first, or random.",
    "name": "The head.",
    "layer": "Layer, from 0.",
    "head": "Head in the layer, from 0.",
    "estimate": "What that estimate says that is lost without it; of a random head, the first estimate.",
    "value": "What was lost when it was taken away. Positive: the task goes worse, in units of the metric.",
    "low": "Low end of the 95 % interval of the value over prompts.",
    "high": "High end of it.",
    "baseline": "What was put in place of the head's output.",
    "n": "Number of prompts.",
}


def tried(subject: Subject, task: "Task", scores: list[HeadScores]) -> pd.DataFrame:
    """The first head of each estimate of a task, and some drawn from the others, each taken away alone.

    Args:
        task: that all scores are of; scores: estimates.
    """
    from lens.heads.pruning.groups import ablate_each

    named = [(score.label, score.top(1)[0], score) for score in scores]
    first = {head for _, head, _ in named}
    left = [one for one in subject.model.info.every_head if one not in first]
    drawn = np.random.default_rng(subject.seed).permutation(len(left))[:_RANDOM]
    named += [("random", left[place], scores[0]) for place in sorted(drawn)]
    losses = ablate_each(
        subject.model,
        task,
        groups=[[head] for _, head, _ in named],
        baseline="pooled_mean" if task.corrupt is None else "counterfactual",
        seed=subject.seed,
        progress=subject.progress,
    )
    rows = []
    for (by, head, score), loss in zip(named, losses, strict=True):
        low, high = loss.interval(seed=subject.seed)
        estimate = float(score.values[head])
        baseline = loss.intervention.baseline
        rows.append(
            (task.name, by, *_place(head), estimate, loss.value, low, high, baseline, loss.n)
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def told(rows: pd.DataFrame, metric: str) -> tuple[str, dict[str, Any]] | None:
    """The sentence and the numbers of the head whose loss is highest among those that estimates put first.

    None where no two heads are left to set beside it, or where these are missed more.

    Args:
        rows: of `tried`, of one task.
        metric: that gets worse.
    """
    at_random = (rows["by"] == "random").to_numpy()
    first: list[dict[Any, Any]] = rows[~at_random].to_dict("records")
    best = max(first, key=lambda row: row["value"])
    others = rows.loc[at_random, "value"].to_numpy(float)
    if len(others) < 2 or best["value"] <= others.mean():
        return None
    several = len({row["name"] for row in first}) > 1
    estimates = "; ".join(
        f"{row['by']} puts {row['name']} first: {row['estimate']:.3g} estimated, {row['value']:.3g} lost"
        for row in first
    )
    text = (
        f"{best['name']} matters most for {best['task']}{' of the heads that estimates put first' if several else ''}: "
        f"without it {metric} is worse by {best['value']:.3g}{ends(best['low'], best['high'])}, without one of "
        f"{len(others)} random heads by {others.mean():.3g} on the mean. {estimates[0].upper()}{estimates[1:]}."
    )
    fields = {name: best[name] for name in ("value", "low", "high")}
    return text, fields | {
        "baseline": float(others.mean()),
        "spread": float(others.std()),
        "many": len({row["name"] for row in first}),
    }


def _place(head: HeadId) -> tuple[str, int, int]:
    return str(head), head.layer, head.head
