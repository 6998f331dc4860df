"""What the circuits of two tasks share, and how much of that their depth alone would give.

Heads that do like work sit in like layers, so circuits share more than sets drawn alike would. The null
therefore renames the heads of the second circuit within their layers: layers, sizes and everything but
which head is which stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd

from lens.circuits.circuit import Circuit
from lens.circuits.edge_scores import EdgeScores
from lens.circuits.graph import Graph
from lens.circuits.head_sets import heads_of
from lens.circuits.selection import pruned, top
from lens.errors import LensError
from lens.head_ids import AnyHead, HeadId, head_id
from lens.heads.scores import HeadScores

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lens.figures.style import Theme

NULLS = ("layers", "all")
MEASURES = {
    "heads": "shared heads / heads in either (Jaccard index)",
    "first in second": "share of the first's heads that are in the second",
    "second in first": "share of the second's heads that are in the first",
    "nodes": "shared writers (heads, MLPs, input) / writers in either",
    "edges": "shared edges / edges in either",
    "rank correlation": "Spearman's, of the sizes of all scores",
}
_ENDS = (2.5, 97.5)
Comparable: TypeAlias = HeadScores | EdgeScores | Circuit | Iterable[AnyHead]


@dataclass(frozen=True, repr=False, eq=False)
class Overlap:
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
    kind: str

    @property
    def shared(self) -> tuple[HeadId, ...]:
        """Heads that are in both."""
        return tuple(HeadId(int(a), int(b)) for a, b in np.argwhere(self.first & self.second))

    def p_value(self, measure: str) -> float:
        """(1 + draws with as much or more) / (1 + draws)."""
        drawn = self.null[measure]
        return float((1 + (drawn >= self.values[measure] - 1e-12).sum()) / (1 + len(drawn)))

    def table(self) -> pd.DataFrame:
        """One row per measure.

        Columns: `measure`, `value`, `low`, `high` (95 % bootstrap interval over the prompts of both
        tasks, NaN without), `chance`, `chance_low`, `chance_high` (mean and middle 95 % of the null),
        `p`.
        """
        rows = []
        for name, value in self.values.items():
            drawn = self.resampled.get(name, np.full(1, np.nan))
            drawn = drawn[~np.isnan(drawn)]
            low, high = np.percentile(drawn, _ENDS) if len(drawn) else (np.nan, np.nan)
            null = self.null[name]
            rows.append(
                (
                    name,
                    value,
                    low,
                    high,
                    null.mean(),
                    *np.percentile(null, _ENDS),
                    self.p_value(name),
                )
            )
        columns = ["measure", "value", "low", "high", "chance", "chance_low", "chance_high", "p"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def heads(self) -> pd.DataFrame:
        """One row per head of either circuit: what it is in, and where it stands in each task.

        Columns: `head`, `circuit` ("both", "first" or "second"), `first` and `second` (its score),
        `first_rank` and `second_rank` (by size among all heads, 1 = largest; NaN = not scored).
        """
        places = np.argwhere(self.first | self.second)
        columns: dict[str, list] = {
            "head": [str(HeadId(int(a), int(b))) for a, b in places],
            "circuit": [
                "both" if self.first[a, b] and self.second[a, b]
                else "first" if self.first[a, b] else "second"
                for a, b in places
            ],
        }  # fmt: skip
        for name, scores in zip(("first", "second"), self.scores, strict=True):
            ranks = pd.DataFrame(-np.abs(scores)).stack().rank(method="min").unstack()
            ranks = ranks.to_numpy() if ranks.size else np.full(scores.shape, np.nan)
            columns[name] = [scores[a, b] for a, b in places]
            columns[f"{name}_rank"] = [ranks[a, b] for a, b in places]
        return pd.DataFrame(columns)

    def plot(
        self,
        *,
        title: str | None = None,
        width: int | None = None,
        height: int | None = None,
        theme: Theme = "light",
    ) -> go.Figure:
        """Each measure with its interval on the band that chance gives; see `lens.figures.overlap`."""
        from lens.figures.overlap import overlap_plot

        return overlap_plot(self, title=title, width=width, height=height, theme=theme)

    def findings(self) -> tuple[str, ...]:
        """What is shared beside chance, and what that does not say, in plain words."""
        either = int((self.first | self.second).sum())
        row = self.table().iloc[0]
        kept = "of the same layers" if self.kind == "layers" else "of any layer"
        found = [
            f"{self.names[0]} and {self.names[1]} share {len(self.shared)} of {either} heads "
            f"(Jaccard {row['value']:.2f}; heads {kept} at random "
            f"{row['chance']:.2f} [{row['chance_low']:.2f}, {row['chance_high']:.2f}], p {row['p']:.2g})."
        ]
        if "rank correlation" in self.values:
            found.append(
                f"All scores put in order agree to {self.values['rank correlation']:.2f} "
                f"(Spearman; p {self.p_value('rank correlation'):.2g})."
            )
        found.append(
            "Shared heads do not say that one circuit does the other's task: run it on the other task "
            "(lens.circuits.control), or redirect its heads (lens.circuits.redirect)."
        )
        return tuple(found)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in self.values.items())
        return f"Overlap({self.names[0]!r} and {self.names[1]!r}: {shown}; null: {self.kind})"


def overlap(
    first: Comparable,
    second: Comparable,
    *,
    count: int | None = None,
    shape: tuple[int, int] | None = None,
    null: str = "layers",
    draws: int = 1000,
    resamples: int = 200,
    seed: int = 0,
) -> Overlap:
    """Compare the circuits of two tasks in one model.

        jaccard(A, B) = |A and B| / |A or B|,    A in B = |A and B| / |A|

    of heads, and of nodes and edges where there are any; of scores also Spearman's correlation of the
    sizes of all of them.

    Args:
        first, second: both `EdgeScores` or both `HeadScores` (the best `count` make the circuit), both
            `Circuit`, or both lists of head names.
        count: edges (chosen as by `EdgeScores.top`) or heads (by size) of each circuit; of scores alone.
        shape: layers and heads of the model; of head names alone.
        null: "layers" renames the heads of the second within each layer, so that its depth stays (with
            one key-value reader per group also its groups); "all" renames them over the whole model,
            which edges do not allow, since they go upwards.
        draws: of the null; p is at least 1 / (1 + draws).
        resamples: of the prompts, both tasks apart, where there are scores of at least 2 prompts each.
        seed: of all draws.

    Raises:
        LensError: two kinds of things, two models or graphs, no head on a side, edges under "all",
            scores that are NaN, or numbers that make no sense.

    Reference: Merullo, Eickhoff, Pavlick 2024, arXiv 2310.08744. That circuits overlap does not mean that
        they do each other's task: Hanna et al. 2024, arXiv 2403.17806.

    Example:
        >>> first, second = (lens.circuits.score_edges(model, task) for task in tasks)
        >>> lens.circuits.overlap(first, second, count=300).table()
    """
    _check(null, draws, resamples)
    draw = np.random.default_rng(seed)
    a, b = _sides(first, second, count, shape)
    edges = isinstance(a, _Edges)
    if edges and null == "all":
        raise LensError(
            "edges go upwards, so heads renamed over all layers would have edges that cannot be; use "
            "null='layers', or compare heads alone"
        )
    if not (a.heads.any() and b.heads.any()):
        raise LensError("one of the circuits has no head, so there is nothing to share; take more")
    renamed = [_measure(a, b.renamed(_renaming(a, null, draw))) for _ in range(draws)]
    redrawn = []
    if a.redrawn is not None and b.redrawn is not None:
        redrawn = [_measure(a.redrawn(draw), b.redrawn(draw)) for _ in range(resamples)]
    values = _measure(a, b)
    return Overlap(
        values,
        {name: np.array([one[name] for one in renamed]) for name in values},
        {name: np.array([one[name] for one in redrawn]) for name in values} if redrawn else {},
        a.heads,
        b.heads,
        (a.by_head, b.by_head),
        (_name(first, "the first"), _name(second, "the second")),
        null,
    )


@dataclass(frozen=True, eq=False)
class _Heads:
    """Heads of one side: which are in the circuit, [layers, heads], and their centred ranks, if any."""

    heads: np.ndarray
    by_head: np.ndarray
    ranks: np.ndarray | None = None
    redrawn: Callable[[np.random.Generator], _Heads] | None = None

    def renamed(self, names: np.ndarray) -> _Heads:
        """Head i is what head `names[i]` was."""
        heads = self.heads.ravel()[names].reshape(self.heads.shape)
        return _Heads(heads, self.by_head, None if self.ranks is None else self.ranks[names])

    def sets(self) -> dict[str, np.ndarray]:
        """Measure -> what is in the circuit."""
        return {"heads": self.heads.ravel()}


@dataclass(frozen=True, eq=False)
class _Edges(_Heads):
    """A circuit of one side, with the edges that are kept."""

    graph: Graph | None = None
    kept: np.ndarray | None = None

    def renamed(self, names: np.ndarray) -> _Edges:
        assert self.graph is not None
        assert self.kept is not None
        order = _renamed_edges(self.graph, names)
        kept = self.kept[order]
        ranks = None if self.ranks is None else self.ranks[order]
        return _Edges(_heads_in(self.graph, kept), self.by_head, ranks, None, self.graph, kept)

    def sets(self) -> dict[str, np.ndarray]:
        assert self.graph is not None
        assert self.kept is not None
        nodes = np.zeros(len(self.graph.writers), bool)
        nodes[self.graph.ends[1][self.kept]] = True
        return {"heads": self.heads.ravel(), "nodes": nodes, "edges": self.kept}


def _measure(a: _Heads, b: _Heads) -> dict[str, float]:
    mine, its = a.sets(), b.sets()
    shared = (a.heads & b.heads).sum()
    found = {
        "heads": _jaccard(mine["heads"], its["heads"]),
        "first in second": float(shared / a.heads.sum()) if a.heads.any() else np.nan,
        "second in first": float(shared / b.heads.sum()) if b.heads.any() else np.nan,
    }
    found |= {name: _jaccard(mine[name], its[name]) for name in mine if name != "heads"}
    if a.ranks is not None and b.ranks is not None:
        found["rank correlation"] = float(a.ranks @ b.ranks)
    return found


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    either = (a | b).sum()
    return float((a & b).sum() / either) if either else np.nan


def _sides(
    first: Comparable, second: Comparable, count: int | None, shape: tuple[int, int] | None
) -> tuple[_Heads, _Heads]:
    scores = isinstance(first, HeadScores | EdgeScores)
    if (count is not None) != scores or (
        count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1)
    ):
        raise LensError(
            "count is the number of edges or heads that scores make a circuit of: a positive integer "
            f"for scores, and none for circuits and head names; got {count!r}"
        )
    for kind in (HeadScores, EdgeScores, Circuit):
        if isinstance(first, kind) != isinstance(second, kind):
            raise LensError(
                "first and second must be of one kind: EdgeScores, HeadScores, Circuit or lists of "
                f"heads; got {type(first).__name__} and {type(second).__name__}"
            )
    if isinstance(first, HeadScores) and isinstance(second, HeadScores):
        assert count is not None
        layers, heads = first.values.shape
        if first.values.shape != second.values.shape or first.model != second.model:
            raise LensError(
                f"heads of {first.model} ({layers} × {heads}) and {second.model} "
                f"({' × '.join(map(str, second.values.shape))}) are not the same heads; score both "
                "tasks in one model"
            )
        if count > layers * heads:
            raise LensError(f"{first.model} has {layers * heads} heads, count asks for {count}")
        return _of_heads(first, count), _of_heads(second, count)
    if isinstance(first, EdgeScores | Circuit) and isinstance(second, EdgeScores | Circuit):
        if first.graph != second.graph or first.model != second.model:
            raise LensError(
                "the two are of different models or graphs, whose edges cannot be compared; got "
                f"{first.graph} of {first.model!r} and {second.graph} of {second.model!r}"
            )
        return _of_edges(first, count), _of_edges(second, count)
    if shape is None:
        raise LensError("names of heads need shape=(layers, heads) of the model")
    return _of_names(first, shape), _of_names(second, shape)


def _of_names(heads: Comparable, shape: tuple[int, int]) -> _Heads:
    found = np.zeros(shape, bool)
    for name in heads_of(heads):  # type: ignore[arg-type]
        found[head_id(name, layers=shape[0], heads=shape[1])] = True
    return _Heads(found, np.full(shape, np.nan))


def _of_heads(scores: HeadScores, count: int) -> _Heads:
    units = np.moveaxis(scores.per_prompt, -1, 0)  # [prompts, layers, heads]

    def side(weights: np.ndarray, again: Callable | None = None) -> _Heads:
        values = np.abs(np.tensordot(weights, units, 1))
        _no_nan(values)
        heads = np.zeros(values.size, bool)
        heads[np.argsort(-values.ravel(), kind="stable")[:count]] = True
        return _Heads(heads.reshape(values.shape), scores.values, _ranks(values.ravel()), again)

    return _with_redraws(side, scores.n)


def _of_edges(given: EdgeScores | Circuit, count: int | None) -> _Heads:
    graph = given.graph
    if isinstance(given, Circuit):
        shape = graph.layers, graph.heads
        heads = _heads_in(graph, given.kept)
        return _Edges(heads, np.full(shape, np.nan), None, None, graph, given.kept)
    assert count is not None
    if count > graph.n:
        raise LensError(f"the graph has {graph.n:,} edges, count asks for {count:,}")
    leaving = np.bincount(graph.ends[1], given.values, len(graph.writers))

    def side(weights: np.ndarray, again: Callable | None = None) -> _Edges:
        values = np.abs(weights @ given.per_prompt)
        _no_nan(values)
        kept = pruned(graph, top(graph, values, count))
        found = _heads_in(graph, kept)
        return _Edges(found, _by_head(graph, leaving), _ranks(values), again, graph, kept)

    return _with_redraws(side, given.n)


def _with_redraws(side: Callable[..., _Heads], n: int) -> _Heads:
    """The side of all prompts, which can be made anew from prompts drawn with replacement."""

    def again(draw: np.random.Generator) -> _Heads:
        return side(draw.multinomial(n, np.full(n, 1 / n)) / n)

    return side(np.full(n, 1 / n), again if n > 1 else None)


def _no_nan(values: np.ndarray) -> None:
    if np.isnan(values).any():
        raise LensError(f"{int(np.isnan(values).sum())} scores are NaN, so they cannot be ranked")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Centred ranks of length 1, ties at their mean rank: products are Spearman's correlation."""
    ranks = pd.Series(values).rank().to_numpy()
    ranks = ranks - ranks.mean()
    size = np.linalg.norm(ranks)
    return ranks / size if size else np.full(len(ranks), np.nan)


def _by_head(graph: Graph, writers: np.ndarray) -> np.ndarray:
    """[layers, heads] of numbers or flags of the writers."""
    return np.stack([writers[graph.heads_of(layer)] for layer in range(graph.layers)])


def _heads_in(graph: Graph, kept: np.ndarray) -> np.ndarray:
    nodes = np.zeros(len(graph.writers), bool)
    nodes[graph.ends[1][kept]] = True
    return _by_head(graph, nodes)


def _renaming(side: _Heads, null: str, draw: np.random.Generator) -> np.ndarray:
    """[layers * heads] which head each one becomes."""
    layers, heads = side.heads.shape
    if null == "all":
        return draw.permutation(layers * heads)
    groups = heads
    if isinstance(side, _Edges) and side.graph is not None:
        groups = side.graph.kv_readers
    return _within_layers(layers, heads, groups, draw)


def _within_layers(layers: int, heads: int, groups: int, draw: np.random.Generator) -> np.ndarray:
    """[layers * heads] groups change places in each layer, and heads in each group."""
    found = []
    for layer in range(layers):
        order = draw.permutation(groups)[:, None]
        inside = draw.permuted(np.tile(np.arange(heads // groups), (groups, 1)), axis=1)
        found.append(layer * heads + (order * (heads // groups) + inside).ravel())
    return np.concatenate(found)


def with_heads_renamed(graph: Graph, kept: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """[edges] a circuit whose heads have changed places at random within their layers."""
    names = _within_layers(graph.layers, graph.heads, graph.kv_readers, draw)
    return kept[_renamed_edges(graph, names)]


def _renamed_edges(graph: Graph, names: np.ndarray) -> np.ndarray:
    """[edges] which edge each one becomes when head i is what `names[i]` was, layers kept."""
    writers, readers = np.arange(len(graph.writers)), np.arange(len(graph.readers))
    size = graph.heads // graph.kv_readers
    for layer in range(graph.layers):
        inside = names[layer * graph.heads : (layer + 1) * graph.heads] - layer * graph.heads
        groups = inside[::size] // size
        start = graph.attention_readers(layer).start
        writers[graph.heads_of(layer)] = graph.heads_of(layer).start + inside
        rows = [inside, graph.heads + groups, graph.heads + graph.kv_readers + groups]
        readers[graph.attention_readers(layer)] = start + np.concatenate(rows)
    numbers = graph.dense(np.arange(graph.n), -1)
    reader, writer = graph.ends
    return numbers[readers[reader], writers[writer]]


def _name(given: Comparable, otherwise: str) -> str:
    task = given.task if isinstance(given, HeadScores | EdgeScores | Circuit) else ""
    return task or otherwise


def _check(null: str, draws: int, resamples: int) -> None:
    if null not in NULLS:
        raise LensError(f"null must be {' or '.join(NULLS)}, got {null!r}")
    for name, number in (("draws", draws), ("resamples", resamples)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise LensError(f"{name} must be a positive integer, got {number!r}")
