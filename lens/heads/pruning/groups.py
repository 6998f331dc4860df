"""Several heads replaced at once."""

from collections.abc import Sequence

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.head_ids import AnyHead
from lens.heads.measures.baselines import Baseline
from lens.heads.measures.checkpoint import Checkpoint
from lens.heads.measures.importances import drops_of
from lens.heads.pruning.group import GroupAblation
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task


def ablate(
    model: LoadedModel,
    task: Task,
    *,
    heads: Sequence[AnyHead],
    baseline: str = "mean",
    seed: Seed = 0,
    progress: bool = True,
) -> GroupAblation:
    """Replace several heads at once.

    Heads that do the same work hide each other: each alone may be spared, all of them may not.
    `GroupAblation.interaction` compares with single heads.

    Args:
        model, task, baseline, seed, progress: as in `lens.heads.importance`.
        heads: `L1H0`, `"1.0"` or `(1, 0)` each.

    Example:
        >>> task = lens.tasks.induction(small, n=4)
        >>> lens.heads.pruning.ablate(small, task, heads=["L1H0", "L1H2", "L1H3"]).n
        4

    Raises:
        LensError: no heads, one named twice, one that the model has not, and as in `lens.heads.importance`.
    """
    return ablate_each(
        model, task, groups=[heads], baseline=baseline, seed=seed, progress=progress
    )[0]


def ablate_each(
    model: LoadedModel,
    task: Task,
    *,
    groups: Sequence[Sequence[AnyHead]],
    baseline: str = "mean",
    seed: int = 0,
    progress: bool = True,
) -> list[GroupAblation]:
    """`ablate` for many groups, with one pass for the clean metric and one for the means of them all."""
    given_as("Task", task=task)
    info = model.info
    if one := next((one for one in groups if isinstance(one, str)), None):
        raise LensError(f"heads must be a list such as ['L1H0'], got the string {one!r}")
    named = [[info.head(head) for head in one] for one in groups]
    if not all(named):
        raise LensError("no heads were given; name at least one, such as 'L1H0'")
    if twice := sorted({str(head) for one in named for head in one if one.count(head) > 1}):
        raise LensError(f"{', '.join(twice)} is named twice; name each head once")
    task.check(model)
    replacement = Baseline(model, task, baseline, seed)
    clean, drops = drops_of(model, task, named, replacement, progress, Checkpoint(None, {}))
    return [
        GroupAblation(
            heads=tuple(one),
            per_prompt=drop,
            clean=clean,
            intervention=replacement.intervention,
            metric=task.metric,
            sign=task.sign,
            task=task.name,
            model=model.name,
        )
        for one, drop in zip(named, drops, strict=True)
    ]
