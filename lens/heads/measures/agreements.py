"""Measures of importance side by side, and how far they agree on the order of the heads."""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lens import stats
from lens.common.choices import Count, Seed, is_whole, shown
from lens.common.errors import LensError
from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence, few, with_ends
from lens.heads.measures.scores import HeadScores

COLUMNS = (
    "first", "second", "tau", "tau_low", "tau_high", "overlap", "overlap_low", "overlap_high",
    "overlap_by_chance",
)  # fmt: skip
_HEAD = ("layer", "head")


@dataclass(frozen=True, repr=False, eq=False)
class Agreement(Result):
    """Agreement of each pair of measures.

    Attributes:
        rows: one row per pair: `first`, `second` (labels of the measures); `tau`, Kendall's tau-b
            over all heads; `overlap`, the share of the k most important heads that both have;
            `overlap_by_chance`, k / number of heads; `_low` and `_high`, 95 % bootstrap intervals
            over prompts, NaN for a single prompt. Tau is NaN where a measure gives all heads one
            value: there is no order to compare.
        k: how many heads are at the top.
        n: prompts of each measure, in the order given.
        seed: of the bootstrap.
        tops: label of each measure -> the k most important heads, first the most important one.
    """

    rows: pd.DataFrame
    k: int
    n: tuple[int, ...]
    seed: int
    tops: Mapping[str, tuple[str, ...]]

    def table(self) -> pd.DataFrame:
        """The rows."""
        return self.rows

    def findings(self, most: int | None = None) -> tuple[Sentence, ...]:
        """One sentence per pair: how many of the k most important heads both name, beside chance, which one names alone (the
        first six), and whether their orders agree beyond chance (tau's interval lies above 0).

        Kinds: "agreement", "opposition", "chance", or "no_order" where that cannot be said.

        Args:
            most: only so many pairs, those that agree least, by tau; None: all, in the order of the table.
        """
        pairs = self.rows.to_dict("records")
        if most is not None:
            order = self.rows["tau"].to_numpy(float).argsort(kind="stable")  # NaN last
            pairs = [pairs[at] for at in order[:most]]
        return tuple(Sentence(self._finding(row), kind=_verdict(row)) for row in pairs)

    def _finding(self, row: Mapping[Hashable, Any]) -> str:
        first, second = row["first"], row["second"]
        tops = [self.tops[first], self.tops[second]]
        sides = [
            f"{few(only)} only by {label}"
            for label, mine, other in ((first, *tops), (second, *reversed(tops)))
            if (only := [head for head in mine if head not in other])
        ]
        share = f"{with_ends(row, 'overlap', '.0%')}, by chance {row['overlap_by_chance']:.0%}"
        where = f"{round(row['overlap'] * self.k)} of their {self.k} most important heads ({share})"
        if self.k == 1:
            where = f"{'no' if sides else 'their'} most important head ({share})"
        alone = f": {'; '.join(sides)}" if sides else ""
        return f"{first} and {second} share {where}{alone}; {_order_in_words(row)}."

    def __repr__(self) -> str:
        rows = [
            f"{row['first']} and {row['second']}: tau {with_ends(row, 'tau', '.2f')}, "
            f"top {self.k} share {row['overlap']:.0%} "
            f"(by chance {row['overlap_by_chance']:.0%})"
            for row in self.rows.to_dict("records")
        ]
        return "Agreement(" + "; ".join(rows) + ")"


def join(
    *tables: HeadScores | Result | pd.DataFrame, seed: Seed = 0, **named: HeadScores | Result
) -> pd.DataFrame:
    """One row per head, in the order of the model, with every measure side by side.

    Joined by `layer` and `head`; `name` comes before them. Importance has a column of its label, with
    `_low` and `_high` behind it for the ends of the interval; measures on several tasks have the task
    in their label. Other results have their own columns. A column that two of them have (such as `n`)
    gets the name of the result behind it: `n_streaming_scores`, or the name given here. NaN where a
    table has no such head. Values of different metrics have different units: compare orders
    (`agreement`).

    Args:
        tables: results with one row per head, or such tables.
        seed: of the intervals of importance; other results have their own.
        named: the same, under a name of your own, which importance then has as its label: `before=..., after=...`
            lays one measure of two checkpoints side by side.

    Raises:
        LensError: none, of models of other sizes (without names of other models), one given twice, under a name that is a
            column of another, or a table that has not one row per head.

    Example:
        >>> scores = lens.heads.importance(small, lens.tasks.induction(small, n=8), method="gradient")
        >>> table = lens.heads.join(scores, lens.heads.roles(small, lens.tasks.copied(small, 25)))
        >>> table.nlargest(1, "induction")["name"].item()
        'L1H0'
    """
    scores = tuple(one for one in tables if isinstance(one, HeadScores))
    own = tuple(one for one in named.values() if isinstance(one, HeadScores))
    if not tables and not named:
        raise LensError("too few measures: at least 1 must be given, got 0")
    _check_models(scores, least=0)
    if len({one.values.shape for one in (*scores, *own)}) > 1:
        raise LensError("only models of one size can be joined head by head")
    labels = iter(
        [*_labels(scores), *(name for name in named if isinstance(named[name], HeadScores))]
    )
    words = [*map(_word, tables, range(1, len(tables) + 1)), *named]
    parts: list[pd.DataFrame] = []
    for one, word in zip((*tables, *named.values()), words, strict=True):
        if isinstance(one, HeadScores):
            label = next(labels)
            names = {"value": label, "low": f"{label}_low", "high": f"{label}_high"}
            rows = one.table(seed=seed)[[*_HEAD, *names]].rename(columns=names)
        else:
            if not hasattr(one, "table") and not isinstance(one, pd.DataFrame):
                raise LensError(
                    f"heads.join takes results with one row per head, or such tables, got {shown(one)}"
                )
            rows = one if isinstance(one, pd.DataFrame) else one.table()
        parts.append(_one_row_each(rows, word))
    for word, part in zip(words, parts, strict=True):
        own = isinstance(named.get(word), HeadScores)
        if own and any(word in other for other in parts if other is not part):
            raise LensError(f"{word} is a column of another result; give this one another name")
    return _side_by_side(parts, words)


def _one_row_each(table: pd.DataFrame, word: str) -> pd.DataFrame:
    """The columns but `name`, indexed by layer and head."""
    for column in _HEAD:
        if column not in table or not pd.api.types.is_integer_dtype(table[column]):
            raise LensError(
                f"{word} has no whole numbers in a column {column!r}; only tables of heads are joined, by "
                f"layer and head; it has {few(list(table.columns))}"
            )
    found = table.drop(columns="name", errors="ignore").set_index(list(_HEAD))
    if not found.index.is_unique:
        raise LensError(
            f"{word} has several rows of L{found.index[0][0]}H{found.index[0][1]} or another head; choose "
            "those of one condition and give the table"
        )
    return found


def _side_by_side(parts: list[pd.DataFrame], words: list[str]) -> pd.DataFrame:
    columns = [str(column) for part in parts for column in part]
    if twice := {word for word in words if words.count(word) > 1}:
        words = [f"{word}_{at}" if word in twice else word for at, word in enumerate(words, 1)]
    renamed = [
        part.rename(
            columns={name: f"{name}_{word}" for name in part if columns.count(str(name)) > 1}
        )
        for part, word in zip(parts, words, strict=True)
    ]
    joined = pd.concat(renamed, axis=1).sort_index()
    return pd.DataFrame(head_columns(joined.index.tolist())).join(joined, on=list(_HEAD))


def _word(result: HeadScores | Result | pd.DataFrame, place: int) -> str:
    """What a result is called in the name of a column: `streaming_scores`, or `table_2`."""
    if isinstance(result, pd.DataFrame):
        return f"table_{place}"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(result).__name__).lower()


def agreement(
    *scores: HeadScores, k: int | None = None, resamples: Count = 300, seed: Seed = 0
) -> Agreement:
    """Kendall's tau-b and top-k overlap between all pairs of measures, with bootstrap intervals.

    `tau = (concordant - discordant) / sqrt((pairs - ties in a) (pairs - ties in b))` over pairs of
    heads (Kendall 1945). Measures of the same task have the same prompts redrawn together; others
    each their own.

    Args:
        scores: two or more, of one model.
        k: heads at the top; None: a quarter of them, at least one.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        LensError: fewer than two, of differing models, with one label on one task, a k that the
            model has not, or no resamples.

    Example:
        >>> measures = [lens.heads.importance(small, copying, method=one) for one in ("gradient", "gate")]
        >>> [said.kind for said in lens.heads.agreement(*measures, k=1).findings()]
        ['agreement']
    """
    _check_models(scores, least=2)
    heads = len(scores[0].names)
    k = max(1, heads // 4) if k is None else k
    if not (is_whole(k) and 1 <= k <= heads):
        raise LensError(f"k must be 1 to {heads}, got {k}")
    labels = _labels(scores)
    values = np.stack([score.rows.mean(-1) for score in scores])
    again = _drawn(scores, resamples, seed)
    matrices = (
        stats.kendall(values),
        *stats.interval(stats.kendall(again)),
        stats.top_overlap(values, k),
        *stats.interval(stats.top_overlap(again, k)),
    )
    rows = [
        (labels[a], labels[b], *(float(matrix[a, b]) for matrix in matrices), k / heads)
        for a, b in combinations(range(len(scores)), 2)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    tops = {
        label: tuple(map(str, score.top(k))) for label, score in zip(labels, scores, strict=True)
    }
    return Agreement(table, k, tuple(score.n for score in scores), seed, tops)


def _verdict(row: Mapping[Hashable, Any]) -> str:
    """The kind of what is said of a pair."""
    if np.isnan(row["tau_low"]):
        return "no_order"
    if row["tau_low"] > 0:
        return "agreement"
    return "opposition" if row["tau_high"] < 0 else "chance"


def _order_in_words(row: Mapping[Hashable, Any]) -> str:
    tau, low, high = row["tau"], row["tau_low"], row["tau_high"]
    if np.isnan(tau):
        return "one of them gives all heads one value, so there is no order to compare"
    if np.isnan(low):
        return f"over all heads tau is {tau:.2f}, without an interval (one of them has a single prompt)"
    shown = f"tau {tau:.2f} [{low:.2f}, {high:.2f}]"
    verdict = _verdict(row)
    if verdict == "agreement":
        return f"over all heads their orders agree beyond chance, {shown}"
    if verdict == "opposition":
        return f"over all heads their orders are opposed, {shown}"
    return f"over all heads their orders are not told apart from chance, {shown}"


def _check_models(scores: tuple[HeadScores, ...], *, least: int) -> None:
    if len(scores) < least:
        raise LensError(f"too few measures: at least {least} must be given, got {len(scores)}")
    models = {(score.model, score.values.shape) for score in scores}
    if len(models) > 1:
        names = ", ".join(sorted(name for name, _ in models))
        raise LensError(f"only measures of one model can be compared, got {names}")


def _labels(scores: tuple[HeadScores, ...]) -> list[str]:
    """Names of the measures, with their tasks where those differ."""
    several = len({score.task for score in scores}) > 1
    labels = [f"{score.label} on {score.task}" if several else score.label for score in scores]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise LensError(
            f"{', '.join(twice)} is given twice; compare different measures (of two checkpoints: "
            "lens.heads.join(before=..., after=...))"
        )
    return labels


def _drawn(scores: tuple[HeadScores, ...], resamples: int, seed: int) -> np.ndarray:
    """Values [resamples, measures, heads] on prompts drawn again; NaN of a measure on a single prompt."""
    random = np.random.default_rng(seed)
    weights: dict[tuple[str, int], np.ndarray] = {}
    found = []
    for score in scores:
        if score.n < 2:
            found.append(np.full((resamples, len(score.names)), np.nan))
            continue
        key = (score.task, score.n)
        if key not in weights:
            weights[key] = stats.draws(score.n, random, resamples)
        found.append(weights[key] @ score.rows.T / score.n)
    return np.stack(found, axis=1)
