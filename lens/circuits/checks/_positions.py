"""`evaluate_positions`: circuits of edges at places beside circuits of edges everywhere, by faithfulness at equal size.

The size of a circuit is the share of all (edge, token) pairs that it keeps: an edge everywhere keeps one for every token,
an edge in a span one for each token of the span. Cut edges carry what the corrupt prompt makes there. A circuit with ways
keeps, beside its edges at places, as large a share of what heads carry across spans, counted in pairs of a query and a key that
it sees; along other ways queries, keys and values are those of the corrupt prompt (`lens.circuits.graph.ways`).
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
from lens.common.choices import Seed, check_between
from lens.common.errors import LensError
from lens.common.results import Result, Sentence, with_ends
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

ENOUGH = 0.85  # faithfulness of a circuit that does most of the task
KINDS = ("at places", "everywhere", "random at places", "places and ways", "random places and ways")


@dataclass(frozen=True, repr=False, eq=False)
class PositionEvaluation(Result):
    """Faithfulness of circuits of growing size.

    Attributes:
        shares: of the (edge, token) pairs that are asked for.
        kept: [kinds, shares], that are kept; kinds in the order of `KINDS`.
        ways: [kinds, shares], share of the pairs of a query and a key along which heads carry what they carry.
        outcomes: of each kind.
        seed: of the random circuits and the bootstrap.
        method, task, model: names.
    """

    shares: tuple[float, ...]
    kept: np.ndarray
    ways: np.ndarray
    outcomes: tuple[Outcome, ...]
    seed: int
    method: str
    task: str
    model: str

    def table(self) -> pd.DataFrame:
        """One row per kind and share: `by`, `share`, `kept`, `ways`, `faithfulness` with `low` and `high` (95 % bootstrap over
        prompts), `n` prompts."""
        tables = []
        for kind, kept, ways, outcome in zip(
            KINDS, self.kept, self.ways, self.outcomes, strict=True
        ):
            low, high = outcome.interval(self.seed)
            tables.append(
                pd.DataFrame(
                    {
                        "by": kind,
                        "share": self.shares,
                        "kept": kept,
                        "ways": ways,
                        "faithfulness": outcome.faithfulness(),
                        "low": low,
                        "high": high,
                        "n": len(outcome.full),
                    }
                )
            )
        return pd.concat(tables, ignore_index=True)

    def smallest(self, faithfulness: float = ENOUGH) -> dict[str, float]:
        """Of each kind the share of pairs of the smallest circuit that reaches a faithfulness; NaN where none does."""
        table = self.table()
        enough = table[table["faithfulness"] >= faithfulness]
        return {kind: float(enough.loc[enough["by"] == kind, "kept"].min()) for kind in KINDS}

    def findings(self) -> tuple[Sentence, ...]:
        """Sizes of the smallest circuits that do most of the task ("size")."""
        table = self.table().sort_values("kept", kind="stable")
        smallest = table[table["faithfulness"] >= ENOUGH].drop_duplicates("by")
        sizes = dict.fromkeys(KINDS, "none") | {
            row["by"]: f"{row['kept']:.2%} ({with_ends(row, 'faithfulness', '.2f', plain=True)})"
            for row in smallest.to_dict("records")
        }
        said = ", ".join(f"{kind} {sizes[kind]}" for kind in KINDS[:3])
        return (
            Sentence(
                f"Share of the edges' tokens that the smallest circuits of a faithfulness of {ENOUGH} keep, with theirs: {said}; with as large a share of "
                f"the ways across spans and the others cut {sizes[KINDS[3]]}, random ones {sizes[KINDS[4]]}.",
                kind="size",
            ),
        )


def evaluate_positions(
    model: LoadedModel,
    task: Task,
    scores: PositionScores,
    shares: Sequence[float] = SHARES[:-1],
    *,
    spans: Given | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> PositionEvaluation:
    """Run circuits of the best edges at places, also with ways across spans cut, of the best edges everywhere, and random ones.

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
        >>> lens.circuits.checks.evaluate_positions(known.model, known.task, scores, [0.05]).table()["faithfulness"].round(2).tolist()
        [1.0, 0.0, 0.0, 1.0, 0.0]
    """
    check_between(0, 1, shares=shares)
    where = _where(task, scores, spans)
    graph, count = scores.graph, len(scores.spans)
    cost = np.repeat(where.sum(2).mean(1), graph.n)  # tokens of each (span, edge)
    here = np.abs(scores.within.mean(0))
    everywhere = np.tile(np.abs(scores.within.mean(0).sum(0)), (count, 1))
    draw = np.random.default_rng(seed)
    placed, spread, drawn = (
        _best(values, cost, shares) for values in (here, everywhere, draw.random(here.shape))
    )
    spread &= spread.all(1, keepdims=True)  # an edge everywhere, or nowhere
    across = np.abs(scores.across.mean(0))
    pairs = np.broadcast_to(_pairs(where, bool(model.info.sees_later)), across.shape).ravel()
    ways, random_ways = (
        _best(values, pairs, shares) for values in (across, draw.random(across.shape))
    )
    every = np.ones_like(ways)
    kept = np.concatenate([placed, spread, drawn, placed, drawn])
    along = np.concatenate([every, every, every, ways, random_ways])
    found = run_circuits(
        model, task, kept, scores.ablation, where=torch.as_tensor(where),
        ways=along, progress=progress,
    )  # fmt: skip
    of_kinds = kept.reshape(len(KINDS), len(shares), -1), along.reshape(len(KINDS), len(shares), -1)
    sizes, carried = (one @ of / of.sum() for one, of in zip(of_kinds, (cost, pairs), strict=True))
    outcomes = tuple(
        Outcome(metric, kl, found.full, found.empty)
        for metric, kl in zip(
            np.split(found.metric, len(KINDS)), np.split(found.kl, len(KINDS)), strict=True
        )
    )
    return PositionEvaluation(
        shares=tuple(shares),
        kept=sizes,
        ways=carried,
        outcomes=outcomes,
        seed=seed,
        method=scores.method,
        task=task.name,
        model=model.name,
    )


def _best(values: np.ndarray, cost: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """[shares, ...] bool: the largest of these values that cost at most so much of the whole; those that cost nothing always."""
    numbers = np.arange(values.size) % values.shape[-1]  # the spans of an edge together
    order = np.lexsort((numbers, -values.ravel()))
    spent = np.cumsum(cost[order]) / cost.sum()
    found = np.zeros((len(shares), values.size), bool)
    for share, kept in zip(shares, found, strict=True):
        kept[order] = (spent <= share + 1e-9) | (cost[order] == 0)
    return found.reshape(len(shares), *values.shape)


def _pairs(where: np.ndarray, ahead: bool) -> np.ndarray:
    """[query spans, key spans], mean number of pairs of a query and a key that it sees; `ahead`: later ones too."""
    seen = np.ones((where.shape[2],) * 2)
    seen = seen if ahead else np.tril(seen)
    own = where.astype(float)
    return np.einsum("spi,ij,tpj->st", own, seen, own, optimize=True) / where.shape[1]


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
