"""`evaluate_positions`: circuits of edges at places beside circuits of edges everywhere, by faithfulness at equal size.

The size of a circuit is the share of all (edge, token) pairs that it keeps: an edge everywhere keeps one for every token,
an edge in a span one for each token of the span. Cut edges carry what the corrupt prompt makes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lens.circuits.checks.evaluation import SHARES, Outcome, run_circuits
from lens.circuits.graph.spans import REST, Given, find_spans
from lens.circuits.scores.position_scores import PositionScores
from lens.common.choices import check_between, check_counts
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence, described
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

KINDS = ("at places", "everywhere", "random at places")


@dataclass(frozen=True, repr=False, eq=False)
class PositionEvaluation(Result):
    """Faithfulness of circuits of growing size.

    Attributes:
        shares: of the (edge, token) pairs that are asked for.
        kept: [kinds, shares], that are kept; kinds in the order of `KINDS`.
        outcomes: of each kind.
        seed: of the random circuits and the bootstrap.
        method, task, model: names.
    """

    shares: tuple[float, ...]
    kept: np.ndarray
    outcomes: tuple[Outcome, ...]
    seed: int
    method: str
    task: str
    model: str

    def table(self) -> pd.DataFrame:
        """One row per kind and share: `by`, `share`, `kept`, `faithfulness` with `low` and `high` (95 % bootstrap over
        prompts), `n` prompts."""
        tables = []
        for kind, kept, outcome in zip(KINDS, self.kept, self.outcomes, strict=True):
            low, high = outcome.interval(self.seed)
            tables.append(
                pd.DataFrame(
                    {
                        "by": kind,
                        "share": self.shares,
                        "kept": kept,
                        "faithfulness": outcome.faithfulness(),
                        "low": low,
                        "high": high,
                        "n": len(outcome.full),
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def smallest(self, faithfulness: float = 0.85) -> dict[str, float]:
        """Of each kind the share of pairs of the smallest circuit that reaches a faithfulness; NaN where none does."""
        table = self.table()
        enough = table[table["faithfulness"] >= faithfulness]
        return {kind: float(enough.loc[enough["by"] == kind, "kept"].min()) for kind in KINDS}

    def findings(self) -> tuple[Sentence, ...]:
        """Sizes of the smallest circuits that do most of the task ("size")."""
        sizes = self.smallest()
        said = ", ".join(
            f"{kind} {'none' if np.isnan(size) else format(size, '.2%')}"
            for kind, size in sizes.items()
        )
        return (
            Sentence(
                f"Share of the edges' tokens that circuits of a faithfulness of 0.85 keep: {said}.",
                kind="size",
            ),
        )

    def __repr__(self) -> str:
        return described(self)


def evaluate_positions(
    model: LoadedModel,
    task: Task,
    scores: PositionScores,
    shares: Sequence[float] = SHARES[:-1],
    *,
    spans: Given | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PositionEvaluation:
    """Run circuits of the best edges at places, of the best edges everywhere, and random ones, at equal size.

    Args:
        model: of the scores.
        task: the prompts that they are of, or others of the same template.
        scores: of `lens.circuits.scores.positions`.
        shares: of all (edge, token) pairs, that circuits keep at most.
        spans: the places in this task's prompts, named as those of the scores; None: its marks where these have the names,
            else the same tokens as there.
        seed: of the random circuits and of the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: another model, or another number of prompts or tokens, than the scores are of.

    Example:
        >>> known = lens.circuits.known.induction_transformer()
        >>> scores = lens.circuits.scores.positions(known.model, known.task, "each")
        >>> lens.circuits.checks.evaluate_positions(known.model, known.task, scores, [0.05]).table()["by"].tolist()
        ['at places', 'everywhere', 'random at places']
    """
    given_as("Task", task=task)
    given_as("PositionScores", scores=scores)
    check_counts(0, seed=seed)
    check_between(0, 1, shares=shares)
    where = _where(task, scores, spans)
    graph, count = scores.graph, len(scores.spans)
    tokens = where.sum(2).mean(1)  # of each span
    cost = np.repeat(tokens, graph.n)  # of each (span, edge)
    here = np.abs(scores.within.mean(0)).ravel()
    everywhere = np.tile(
        np.abs(scores.within.mean(0).sum(0)), count
    )  # one number for all spans of an edge
    drawn = np.random.default_rng(seed).random(here.size)
    kinds, sizes = [], []
    for values in (here, everywhere, drawn):
        order = np.lexsort(
            (np.tile(np.arange(graph.n), count), -values)
        )  # the spans of an edge together
        spent = np.cumsum(cost[order]) / cost.sum()
        made = [
            np.isin(np.arange(here.size), order[: int((spent <= share).sum())]) for share in shares
        ]
        kinds.append(np.stack(made).reshape(len(made), count, graph.n))
        sizes.append([float(cost[one].sum() / cost.sum()) for one in made])
    kinds[1] = kinds[1] & kinds[1].all(1, keepdims=True)  # an edge everywhere, or nowhere
    sizes[1] = [float(one[0].sum() / graph.n) for one in kinds[1]]
    found = run_circuits(
        model, task, np.concatenate(kinds), scores.ablation, where=torch.as_tensor(where),
        progress=progress,
    )  # fmt: skip
    outcomes = tuple(
        Outcome(metric, kl, found.full, found.empty)
        for metric, kl in zip(
            np.split(found.metric, len(KINDS)), np.split(found.kl, len(KINDS)), strict=True
        )
    )
    return PositionEvaluation(
        shares=tuple(shares),
        kept=np.array(sizes),
        outcomes=outcomes,
        seed=seed,
        method=scores.method,
        task=task.name,
        model=model.name,
    )


def _where(task: Task, scores: PositionScores, spans: Given | None) -> np.ndarray:
    """[spans, prompts, tokens] of the task."""
    named = set(scores.spans) - {REST}
    if spans is None and named != set(task.marks):
        if scores.where.shape[1:] != (task.n, task.length):
            raise LensError(
                f"the places are of {scores.where.shape[1]} prompts of {scores.where.shape[2]} tokens, and the task has "
                f"{task.n} of {task.length}; give spans"
            )
        return scores.where
    found = find_spans(task, spans)
    if found.names != scores.spans:
        raise LensError(
            f"the places must be named {', '.join(scores.spans)}, as in the scores; got {', '.join(found.names)}"
        )
    return found.where.numpy()
