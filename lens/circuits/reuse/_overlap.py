"""What the circuits of two tasks share, and how much of that their depth alone would give.

Heads that do like work sit in like layers, so circuits share more than sets drawn alike would. The null
therefore renames the heads of the second circuit within their layers: layers, sizes and everything but
which head is which stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lens import stats
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.reuse._sides import Comparable, EdgeSide, measured, renaming, sides
from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.given import given_as, is_of
from lens.common.head_ids import HeadId, head_columns
from lens.common.results import Result, Sentence, with_ends
from lens.heads.measures.scores import HeadScores
from lens.stats.controls import p_value

Null = Literal["layers", "all"]
MEASURES = {
    "heads": "shared heads / heads in either (Jaccard index)",
    "first in second": "share of the first's heads that are in the second",
    "second in first": "share of the second's heads that are in the first",
    "nodes": "shared writers (heads, MLPs, input) / writers in either",
    "edges": "shared edges / edges in either",
    "rank correlation": "Spearman's, of the sizes of all scores",
}


@dataclass(frozen=True, repr=False, eq=False)
class Overlap(Result):
    """What two circuits share.

    Attributes:
        values: measure (of `MEASURES`, those that the given things have) -> its value.
        null: measure -> [draws], its value when the heads of the second are renamed at random.
        resampled: measure -> [resamples], its value when the prompts of both tasks are drawn again;
            empty without scores of several prompts. Circuits of redrawn prompts are noisier than
            those of all prompts, so these tend to lie below the value.
        first, second: bool [layer, head], the heads of each.
        scores: of each side [layer, head], NaN = not scored; of edge scores the sum over the edges that
            leave the head.
        names: of the two tasks.
        kind: of the null, "layers" or "all".
    """

    values: dict[str, float]
    null: dict[str, np.ndarray]
    resampled: dict[str, np.ndarray]
    first: np.ndarray
    second: np.ndarray
    scores: tuple[np.ndarray, np.ndarray]
    names: tuple[str, str]
    kind: Null

    @property
    def shared(self) -> tuple[HeadId, ...]:
        """Heads that are in both."""
        return tuple(HeadId(*at) for at in np.argwhere(self.first & self.second).tolist())

    def p_value(self, measure: str) -> float:
        """(1 + draws with as much or more) / (1 + draws)."""
        return p_value(self.values[measure], self.null[measure])

    def table(self) -> pd.DataFrame:
        """One row per measure.

        Columns: `measure`, `value`, `low`, `high` (middle 95 % of circuits made of prompts of both tasks drawn again, which
        the value may lie outside of; NaN without), `chance`, `chance_low`, `chance_high` (mean and middle 95 % of the null),
        `p`.
        """
        rows = []
        for name, value in self.values.items():
            null, ends = self.null[name], stats.interval(self.resampled.get(name, []))
            chance = (null.mean(), *stats.interval(null))
            rows.append((name, value, *ends, *chance, self.p_value(name)))
        columns = ["measure", "value", "low", "high", "chance", "chance_low", "chance_high", "p"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def heads(self) -> pd.DataFrame:
        """One row per head of either circuit: what it is in, and where it stands in each task.

        Columns: `name`, `layer`, `head`, `circuit` ("both", "first" or "second"), `first` and `second` (its score),
        `first_rank` and `second_rank` (by size among all heads, 1 = largest; NaN = not scored).
        """
        places = np.argwhere(self.first | self.second)
        words = np.array(["", "first", "second", "both"])
        columns = head_columns(places.tolist())
        columns["circuit"] = words[self.first + 2 * self.second][tuple(places.T)]
        for name, scores in zip(("first", "second"), self.scores, strict=True):
            ranks = pd.DataFrame(-np.abs(scores)).stack().rank(method="min").unstack()
            ranks = ranks.to_numpy() if ranks.size else np.full(scores.shape, np.nan)
            columns[name] = [scores[a, b] for a, b in places]
            columns[f"{name}_rank"] = [ranks[a, b] for a, b in places]
        return pd.DataFrame(columns)

    def findings(self) -> tuple[Sentence, ...]:
        """What is shared beside chance ("shared", "orders"), and what that does not say ("limit")."""
        either = int((self.first | self.second).sum())
        rows = self.table().set_index("measure")
        row = rows.loc["heads"]
        kept = "of the same layers" if self.kind == "layers" else "of any layer"
        shared = (
            f"{self.names[0]} and {self.names[1]} share {len(self.shared)} of {either} heads "
            f"(Jaccard {_redrawn(row)}; heads {kept} at random "
            f"{with_ends(row, 'chance', '.2f')}, p {row['p']:.2g})."
        )
        found = [Sentence(shared, kind="shared")]
        if "rank correlation" in self.values:
            row = rows.loc["rank correlation"]
            orders = (
                f"All scores put in order agree to {_redrawn(row)} (Spearman; "
                f"{with_ends(row, 'chance', '.2f')} by chance, p {row['p']:.2g})."
            )
            found.append(Sentence(orders, kind="orders"))
        limit = (
            "Shared heads do not say that one circuit does the other's task: run it on the other task "
            "(lens.circuits.checks.control), or redirect its heads (lens.circuits.reuse.redirect)."
        )
        return (*found, Sentence(limit, kind="limit"))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in self.values.items())
        return f"Overlap({self.names[0]!r} and {self.names[1]!r}: {shown}; null: {self.kind})"


def _redrawn(row: Any) -> str:
    """A value, and between what those of circuits of redrawn prompts lie: no interval of it, as these are noisier."""
    drawn = f", of redrawn prompts {row['low']:.2f} to {row['high']:.2f}"
    return f"{row['value']:.2f}{drawn * bool(row['low'] == row['low'])}"


def overlap(
    first: Comparable,
    second: Comparable,
    *,
    count: int | None = None,
    shape: tuple[int, int] | None = None,
    scores: tuple[EdgeScores, EdgeScores] | None = None,
    null: Null = "layers",
    draws: Count = 1000,
    resamples: Count = 200,
    seed: Seed = 0,
) -> Overlap:
    """Compare the circuits of two tasks in one model.

        jaccard(A, B) = |A and B| / |A or B|,    A in B = |A and B| / |A|

    of heads, and of nodes and edges where there are any; of scores also Spearman's correlation of the
    sizes of all of them.

    Args:
        first, second: both `EdgeScores` or both `HeadScores` (the best `count` make the circuit), both
            `Circuit`, or both lists of head names; two that `lens.circuits.find` returned are circuits with their scores.
        count: edges (chosen as by `EdgeScores.top`) or heads (by size) of each circuit; of scores alone.
        shape: layers and heads of the model; of head names alone.
        scores: of all edges, those that each of two circuits was made from: adds the rank correlation.
        null: "layers" renames the heads of the second within each layer, so that its depth stays (with
            one key-value reader per group also its groups); "all" renames them over the whole model,
            which edges do not allow, since they go upwards.
        draws: of the null; p is at least 1 / (1 + draws).
        resamples: of the prompts, both tasks apart, where there are scores of at least 2 prompts each.
        seed: of all draws.

    Raises:
        LensError: two kinds of things, two models or graphs, no head on a side, edges under "all",
            scores that are NaN or not of the circuits' graph, or numbers that make no sense.

    Reference: Merullo, Eickhoff, Pavlick 2024, arXiv 2310.08744. That circuits overlap does not mean that
        they do each other's task: Hanna et al. 2024, arXiv 2403.17806.

    Example:
        >>> tasks = copying, lens.tasks.induction(small, n=4, seed=1)
        >>> first, second = (lens.circuits.score_edges(small, one) for one in tasks)
        >>> lens.circuits.reuse.overlap(first, second, count=20).table()
    """
    draw = np.random.default_rng(seed)
    if is_of("Circuit", first) and is_of("Circuit", second):
        if scores is None and is_of("EdgeScores", first) and is_of("EdgeScores", second):
            scores = given_as("EdgeScores", first=first), given_as("EdgeScores", second=second)
        first, second = given_as("Circuit", first=first), given_as("Circuit", second=second)
    a, b = sides(first, second, count, shape, scores)
    edges = isinstance(a, EdgeSide)
    if edges and null == "all":
        raise LensError(
            "edges go upwards, so heads renamed over all layers would have edges that cannot be; use "
            "null='layers', or compare heads alone"
        )
    if not (a.heads.any() and b.heads.any()):
        raise LensError("one of the circuits has no head, so there is nothing to share; take more")
    renamed = [measured(a, b.renamed(renaming(a, null, draw))) for _ in range(draws)]
    redrawn = []
    if a.redrawn is not None and b.redrawn is not None:
        redrawn = [measured(a.redrawn(draw), b.redrawn(draw)) for _ in range(resamples)]
    values = measured(a, b)
    drawn, resampled = (
        {name: np.array([one[name] for one in runs]) for name in values} if runs else {}
        for runs in (renamed, redrawn)
    )
    names = _name(first, "the first"), _name(second, "the second")
    scored = a.by_head, b.by_head
    return Overlap(values, drawn, resampled, a.heads, b.heads, scored, names, null)


def _name(given: Comparable, otherwise: str) -> str:
    task = given.task if isinstance(given, HeadScores | EdgeScores | Circuit) else ""
    return task or otherwise
