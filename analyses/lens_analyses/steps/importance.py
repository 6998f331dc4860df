"""Which heads matter: several measures on one task and on text, where they disagree, what may go."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from lens import heads, tasks
from lens.common.errors import LensError
from lens.common.results import ends
from lens.figures import agreement_map
from lens.heads.measures.methods import Baseline, Method
from lens.heads.measures.scores import HeadScores
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens.stats.verdicts import verdict
from lens.tasks import Task
from lens_analyses.config.sizes import pruning_size
from lens_analyses.steps import tried
from lens_analyses.steps.headlines import change, of_importance, of_pruning
from lens_analyses.steps.subject import Subject

_UNITS = "Positive: the task goes worse without the head, in units of the metric."
_ORDERS: tuple[tuple[Method, Baseline], ...] = (
    ("ablation", "pooled_mean"),
    ("attribution", "pooled_mean"),
    ("gradient", "zero"),
)
_QUICK_ORDERS = _ORDERS[1:]  # of many heads, each of which would take a pass
_PAIRS = 3  # of measures whose disagreement is told; the table has all
_JOINT = 4  # heads at most that are taken away together


def importance(subject: Subject) -> Section:
    """Every measure that the configuration names, on the task and on the run's text, or on targets of sources."""
    of_pairs = bool(subject.model.parts)
    measured = [] if of_pairs else [subject.task]
    also_text = subject.settings.task != "text" and subject.prompts("text")
    if also_text and not of_pairs and not subject.labelled:
        measured.append(subject.windows)
    scores, refused = _measure(subject, measured)
    joined = heads.join(*scores, seed=subject.seed)
    agreement = heads.agreement(*scores, seed=subject.seed) if len(scores) > 1 else None
    tables = {"scores": joined}
    if agreement is not None:
        tables["agreement"] = agreement.table()
    figures = {f"grid_{number}": score.plot() for number, score in enumerate(scores)}
    if agreement is not None:
        figures["agreement"] = agreement_map(agreement)
    joint, sentences = (None, []) if of_pairs else _joint(subject, scores)
    if joint is not None:
        tables["together"] = joint
    candidates = _candidates(subject, measured, scores)
    if candidates is not None:
        tables["tried"] = candidates
    headlines = list(of_importance(scores, candidates))
    return Section(
        name="importance",
        title="Which heads matter",
        summary=(
            *(one.text for one in headlines),
            *sentences,
            *(agreement.findings(most=_PAIRS) if agreement is not None else ()),
        ),
        limits=(
            "Importance is for these prompts and this replacement of the head's output; another "
            "baseline asks another question.",
            "Gradient, attribution and direct are first-order estimates: they miss what saturates "
            "(logic gates, a softmax near one key) and what other heads make up for.",
            *dict.fromkeys(said for one in scores if (said := one.intervention.own_share(one.n))),
            *refused,
            *(f"{task.name}: {reason}" for task in measured for reason in task.dropped),
        ),
        columns={
            "name": "The head.",
            "layer": "Layer, from 0.",
            "head": "Head in the layer, from 0.",
            **_score_columns(joined),
            **_AGREEMENT,
            **_TOGETHER,
            **tried.COLUMNS,
        },
        configuration={
            "measures": [
                {
                    "label": score.label,
                    "method": score.method,
                    "task": score.task,
                    "metric": score.metric,
                    "prompts": score.n,
                }
                | {"intervention": asdict(score.intervention)}
                for score in scores
            ],
            "seed": subject.seed,
        },
        tables=tables,
        figures=figures,
        headlines=(
            *headlines,
            *(of_heads_together(joint, scores[0].metric) if joint is not None else ()),
        ),
    )


def pruning(subject: Subject) -> Section:
    """What it costs when heads go, in several orders, against random ones.

    On the run's text, or on the task where there is none.
    """
    is_text = subject.prompts("text") and not subject.labelled
    task = subject.windows if is_text else subject.task
    fitted, held_out = _halves(task)
    options = {"seed": subject.seed, "progress": subject.progress}
    orders, refused = [], []
    points, draws = pruning_size(len(subject.model.info.every_head))
    for method, baseline in _ORDERS if points is None else _QUICK_ORDERS:
        try:
            order = heads.importance(
                subject.model, fitted, method=method, baseline=baseline, **options
            )
            orders.append(order)
        except LensError as problem:
            refused.append(f"No order by {method}: {problem}.")
    if not orders:
        raise LensError(f"no order of the heads could be had: {' '.join(refused)}")
    found = heads.pruning.orders(
        subject.model,
        held_out,
        orders=orders,
        baseline="pooled_mean",
        steps=points,
        draws=draws,
        **options,
    )
    return Section(
        name="pruning",
        title="What may be pruned",
        summary=tuple(found.findings()),
        limits=(
            f"Heads were ordered on {fitted.n} prompts and removed on {held_out.n} others; nothing was "
            "trained again.",
            f"The best of {len(orders)} orders was chosen on the prompts that its cost is from, which "
            "flatters it a little; an order that nobody tried may be better.",
            *refused,
        ),
        columns=_PRUNING,
        configuration={
            "orders": [one.ranking for one in found.curves],
            "best": found.best.ranking,
            "bearable": found.bearable,
            "intervention": asdict(found.best.intervention),
        },
        tables={"curve": found.table(seed=subject.seed)},
        figures={"curve": found.plot()},
        headlines=tuple(
            of_pruning(
                found.table(seed=subject.seed),
                found.best.ranking,
                len(found.best.prunable(found.limit)),
                len(found.best.order),
                found.best.metric,
                found.best.sign,
            )
        ),
    )


def _measure(subject: Subject, several: list[Task]) -> tuple[list[HeadScores], list[str]]:
    """Scores by each measure on each task, or where there is none on the run's targets; why some could not be had.

    Raises:
        LensError: none that can be had.
    """
    scores, refused = [], []
    for task in several or [None]:
        for method, baseline in subject.settings.measured:
            try:
                given = _of_targets(subject, method) if task is None else task
                if method == "attribution" and not baseline and given.corrupt is None:
                    baseline = "pooled_mean"
                kept = None if task is None else subject.work / f"{len(scores)}-{method}.npz"
                score = heads.importance(
                    subject.model,
                    given,
                    method=method,
                    baseline=baseline or None,
                    seed=subject.seed,
                    progress=subject.progress,
                    checkpoint=kept,
                )
                scores.append(score)
            except LensError as problem:
                on = "the targets" if task is None else task.name
                refused.append(f"{method}{' ' if baseline else ''}{baseline} on {on}: {problem}.")
    if not scores:
        raise LensError(f"no measure could be had: {' '.join(refused)}")
    return scores, refused


def _candidates(
    subject: Subject, measured: list[Task], scores: list[HeadScores]
) -> pd.DataFrame | None:
    """Of each task that was estimated alone, the heads that the estimates put first, taken away; None: no such task."""
    found = []
    for task in measured:
        mine = [score for score in scores if score.task == task.name]
        if mine and len(mine[0].names) > 1 and all(one.method != "ablation" for one in mine):
            found.append(tried.tried(subject, task, mine))
    return pd.concat(found, ignore_index=True) if found else None


def _of_targets(subject: Subject, method: str) -> Any:
    """The loss of the run's targets: ablation takes pairs of any lengths, other methods a task of one length."""
    pairs = list(subject.given)
    return pairs if method == "ablation" else tasks.language_modelling(subject.model, pairs)


def _joint(subject: Subject, scores: list[HeadScores]) -> tuple[pd.DataFrame | None, list[str]]:
    """Heads of one role taken away together: those that stand in for each other look small alone."""
    on_task = (one for one in scores if one.method == "ablation" and one.task == subject.task.name)
    single = next(on_task, None)
    if single is None:
        return None, []
    rows, said = [], []
    for role, group in _groups(subject).items():
        found = heads.pruning.ablate(
            subject.model,
            subject.task,
            heads=group,
            baseline=single.intervention.baseline,
            seed=subject.seed,
            progress=False,
        )
        names, extra = " ".join(map(str, found.heads)), found.interaction(single)
        apart = found.interaction_interval(single, seed=subject.seed)
        own = (found.value, *found.interval(seed=subject.seed))
        rows.append((role, names, *own, found.value - extra, extra, *apart, found.n))
        said += [
            f"{role.replace('_', ' ').capitalize()} heads: {one}"
            for one in found.findings(single, seed=subject.seed)
        ]
    return pd.DataFrame(rows, columns=list(_TOGETHER)) if rows else None, said


def of_heads_together(table: pd.DataFrame, metric: str) -> Iterator[Headline]:
    """Heads of one role that stand in for each other: what they are worth together beyond the sum of each alone."""
    for row in table.to_dict("records"):
        low, high = row["interaction_low"], row["interaction_high"]
        if verdict(low, high) == "above":
            yield Headline(
                f"The {row['role']} heads {row['heads']} stand in for each other: together they are worth "
                f"{row['value']:.3g}{ends(row['low'], row['high'])}, alone {row['alone']:.3g} in sum: "
                f"{change(row, 'interaction')} more.",
                row["interaction"],
                low,
                high,
                0.0,
                "heads that do not stand in for each other",  # exact: the interval is of the difference
                unit=metric,
            )


def _groups(subject: Subject) -> dict[str, list[str]]:
    """Role -> its heads, where the profile names two to four of them."""
    from lens.traces.findings import findings

    return {
        one.kind: [f"L{head.layer}H{head.head}" for head in one.heads]
        for one in findings(subject.run.heads)
        if one.found and 2 <= len(one.heads) <= _JOINT
    }


def _halves(task: Task) -> tuple[Task, Task]:
    rows = torch.arange(task.n)
    return task.take(rows[: task.n // 2]), task.take(rows[task.n // 2 :])


def _score_columns(joined: pd.DataFrame) -> dict[str, str]:
    made = {}
    for column in map(str, joined.columns[3:]):
        name = column.removesuffix("_low").removesuffix("_high")
        made[column] = (
            f"Importance by {name}. {_UNITS}"
            if name == column
            else f"End of the 95 % bootstrap interval of {name} over prompts."
        )
    return made


_AGREEMENT = {
    "first": "One measure.",
    "second": "The other.",
    "tau": "Kendall's tau-b of the order of all heads, 1 = the same order.",
    "tau_low": "Low end of its 95 % interval.",
    "tau_high": "High end of its 95 % interval.",
    "overlap": "Share of the k most important heads that both have; k is a quarter of the heads.",
    "overlap_low": "Low end of its 95 % interval.",
    "overlap_high": "High end of its 95 % interval.",
    "overlap_by_chance": "What two random orders would share.",
}
_TOGETHER = {
    "role": "What the heads have in common.",
    "heads": "Heads taken away together.",
    "value": "What they are worth together. " + _UNITS,
    "low": "Low end of the 95 % interval.",
    "high": "High end of the 95 % interval.",
    "alone": "Sum of what they are worth one by one.",
    "interaction": "value - alone, paired: positive where heads stand in for each other.",
    "interaction_low": "Low end of its 95 % interval.",
    "interaction_high": "High end of it.",
    "n": "Number of prompts.",
}
_PRUNING = {
    "order": "Order in which heads go.",
    "removed": "Heads removed so far, least important first.",
    "name": "The last of them.",
    "value": "The metric.",
    "cost": "How much worse than the whole model.",
    "low": "Low end of its 95 % interval over prompts.",
    "high": "High end of its 95 % interval.",
    "random_cost": "Mean cost of as many heads in random orders.",
    "random_low": "Lowest of the random orders.",
    "random_high": "Highest of the random orders.",
    "n": "Number of prompts.",
}
