"""Which sparse pattern each head would survive: A-shape, vertical-slash, block-sparse, or none.

The lines and blocks are chosen by exact statistics of the whole prompt (received mass per key, mass
per distance, block mass), and the mass that they keep is exact too: of blocks it follows from the
block map, of lines it is added up from probabilities recomputed one panel of rows at a time, because
a column and a diagonal cross. The search is that of MInference with the real sums in place of its
estimate from the last 64 queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lens.common.choices import is_number, is_whole
from lens.common.errors import LensError
from lens.common.given import given_traces
from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence, counted
from lens.stats.intervals import columns

if TYPE_CHECKING:
    from lens.traces.trace import AttentionTrace

CLASSES = ("a_shape", "vertical_slash", "block_sparse")
DIFFUSE = "diffuse"
_PANEL = 64  # rows of probabilities in memory at a time
_NEEDED = ("q", "k", "lse", "received", "diagonal", "block_mass")


@dataclass(frozen=True, repr=False, eq=False)
class PatternClasses(Result):
    """Mass that each kind of sparse pattern keeps in every head at one budget.

    Attributes:
        kept: [class, layer, head, prompt], in the order of `CLASSES`: mean over the rows of the
            probability that lies inside the best pattern of that kind.
        density: [class, prompt], largest share of the visible (query, key) pairs that a head's
            pattern took; never above `budget`.
        budget: share of the visible pairs that a pattern may take.
        enough: kept mass below which no pattern fits.
        tolerance: a simpler pattern that keeps this much less is preferred (every A-shape is
            a vertical-slash pattern too).
        sink: first keys of the A-shape.
        layers: their numbers.
        model: its name.
    """

    kept: np.ndarray
    density: np.ndarray
    budget: float
    enough: float
    tolerance: float
    sink: int
    layers: tuple[int, ...]
    model: str

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.kept.shape[-1]

    @property
    def classes(self) -> np.ndarray:
        """[layer, head]: the first of `CLASSES` within `tolerance` of the best, or "diffuse"."""
        mean = self.kept.mean(-1)
        best = mean.max(0)
        first = (mean >= best - self.tolerance).argmax(0)
        return np.where(best < self.enough, DIFFUSE, np.array(CLASSES)[first])

    @property
    def margin(self) -> np.ndarray:
        """[layer, head]: kept mass of the class less the best of the others; of a diffuse head, what is
        lacking to `enough`."""
        mean, classes = self.kept.mean(-1), self.classes
        best = mean.max(0)
        own = np.array(CLASSES)[:, None, None] == classes
        others = np.where(own, -np.inf, mean).max(0)
        chosen = np.where(own, mean, -np.inf).max(0)
        return np.where(classes == DIFFUSE, self.enough - best, chosen - others)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: `name`, `layer`, `head`, `pattern`, `margin`, `n`, and for each of `CLASSES`
        the kept mass with its 95 % bootstrap interval over prompts (`_low`, `_high`; NaN for one).
        """
        heads = range(self.kept.shape[2])
        found = head_columns((layer, head) for layer in self.layers for head in heads)
        found |= {"pattern": self.classes.ravel(), "margin": self.margin.ravel(), "n": self.n}
        for name, kept in zip(CLASSES, self.kept, strict=True):
            found |= columns(name, kept, seed)
        return pd.DataFrame(found)

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads have each pattern."""
        names = self.classes.ravel().tolist()
        shown = ", ".join(
            f"{names.count(name)} {name.replace('_', '-')}"
            for name in (*CLASSES, DIFFUSE)
            if name in names
        )
        text = (
            f"With {self.budget:.0%} of the visible pairs, of {len(names)} heads {shown} (a class must keep "
            f"{self.enough:.0%} of the mass, and a simpler one wins that keeps at most {self.tolerance:.3g} less; on "
            f"{counted(self.n, 'prompt')})."
        )
        return (Sentence(text, kind="patterns"),)

    def __repr__(self) -> str:
        names, counts = np.unique(self.classes, return_counts=True)
        shown = ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
        return f"PatternClasses({self.model}: {shown}; {self.budget:.0%} of the pairs, {self.n} prompts)"


def patterns(
    traces: AttentionTrace | Sequence[AttentionTrace],
    *,
    budget: float = 0.25,
    enough: float = 0.8,
    tolerance: float = 0.02,
    sink: int = 4,
) -> PatternClasses:
    """The sparse pattern that keeps most of each head's attention within a budget of pairs.

        a_shape         keys j < sink, and the nearest keys i - j < local; local fills the budget
        vertical_slash  columns and diagonals by mass per pair, until the budget is spent
        block_sparse    blocks of the block map by mass per pair, until the budget is spent

    Args:
        traces: of `lens.capture(..., keep_qk=True)`, causal; one or several of the same model.
        budget: share of the visible (query, key) pairs, between 0 and 1.
        enough: kept mass below which a head is "diffuse".
        tolerance: by how much a simpler pattern may keep less and still be preferred.
        sink: first keys of the A-shape.

    Reference: Jiang et al., MInference 1.0, 2024, arXiv 2407.02490.

    Raises:
        LensError: no trace, traces of different models, one that lacks a statistic or looks ahead,
            a head whose probabilities cannot be recomputed, or numbers out of range.

    Example:
        >>> lens.heads.patterns(trace).table()["pattern"]
    """
    several = given_traces(traces)
    _check(several, budget, enough, tolerance, sink)
    kept, density = zip(*(_of_trace(trace, budget, sink) for trace in several), strict=True)
    return PatternClasses(
        kept=np.stack(kept, -1),
        density=np.stack(density, -1),
        budget=budget,
        enough=enough,
        tolerance=tolerance,
        sink=sink,
        layers=several[0].layers,
        model=several[0].model,
    )


def _check(
    traces: list[AttentionTrace], budget: float, enough: float, tolerance: float, sink: int
) -> None:
    for name, value in (("budget", budget), ("enough", enough)):
        if not is_number(value) or not 0 < value < 1:
            raise LensError(f"{name} must lie between 0 and 1, got {value}")
    if not is_number(tolerance) or not 0 <= tolerance < 1:
        raise LensError(f"tolerance must be 0 or more and below 1, got {tolerance}")
    if not is_whole(sink) or sink < 0:
        raise LensError(f"sink is a number of keys, got {sink}")
    if len({(trace.model, trace.layers, trace.heads) for trace in traces}) > 1:
        raise LensError("traces must come from one model; classify them apart")
    for trace in traces:
        if missing := [name for name in _NEEDED if name not in trace.dataset]:
            raise LensError(
                f"the patterns need {', '.join(missing)}, which this trace lacks; capture it with "
                "statistics='all' and keep_qk=True"
            )
        if not trace.attrs["causal"]:
            raise LensError(
                f"{trace.model} looks ahead; the patterns are defined for causal models"
            )


def _of_trace(trace: AttentionTrace, budget: float, sink: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept mass [class, layer, head], and the largest density of each class."""
    kept = np.empty((len(CLASSES), len(trace.layers), trace.heads))
    density = np.zeros(len(CLASSES))
    for place, layer in enumerate(trace.layers):
        if not trace.has_plain_mask(layer):
            raise LensError(
                f"layer {layer} of {trace.model} has a mask that is neither causal nor a window"
            )
        space = _Space(trace.length, trace.window(layer), trace.attrs["block_size"], budget)
        a_shape = space.a_shape(sink)
        for head in range(trace.heads):
            data = trace.select((layer, head))
            lines = space.lines(data["received"].values, data["diagonal"].values)
            inside = _mass_of_lines(trace, layer, head, [a_shape, lines])
            blocks, pairs = space.blocks(data["block_mass"].values)
            kept[:, place, head] = [*inside, blocks]
            used = np.array([space.pairs_of(a_shape), space.pairs_of(lines), pairs])
            density = np.maximum(density, used / space.total)
    return kept, density


@dataclass(frozen=True, eq=False)
class _Lines:
    """Columns (bool [keys]) and diagonals (bool [distances]) that are kept."""

    columns: np.ndarray
    diagonals: np.ndarray

    def inside(self, rows: np.ndarray) -> np.ndarray:
        """bool [rows, keys], for the rows with these positions."""
        distance = rows[:, None] - np.arange(len(self.columns))
        return self.columns | ((distance >= 0) & self.diagonals[np.maximum(distance, 0)])


class _Space:
    """The (query, key) pairs that a causal layer sees, and what fits into a share of them."""

    def __init__(self, length: int, window: int | None, block: int, budget: float) -> None:
        self._length, self._block = length, block
        self._reach = length if window is None else min(window, length)
        position = np.arange(length)
        self._of_column = np.minimum(length - position, self._reach)  # pairs
        self._of_diagonal = np.where(position < self._reach, length - position, 0)
        self._starts = np.arange(0, length, block)
        self._rows = np.minimum(length - self._starts, block)
        self._of_block = np.stack(
            [self._pairs_below(start) for start in self._starts.tolist()], axis=-1
        )
        self.total = int(self._of_column.sum())
        self._most = int(budget * self.total)

    def _pairs_below(self, start: int) -> np.ndarray:
        """[query blocks]: visible pairs with the keys of the block that begins at `start`."""
        position = np.arange(self._length)
        last = np.minimum(position, min(start + self._block, self._length) - 1)
        first = np.maximum(position - self._reach + 1, start)
        return np.add.reduceat(np.maximum(last - first + 1, 0), self._starts)

    def pairs_of(self, lines: _Lines) -> int:
        """Visible pairs inside, those where lines cross counted once."""
        columns, diagonals = lines.columns, lines.diagonals & (self._of_diagonal > 0)
        below = np.cumsum(diagonals)[::-1]  # [keys]: diagonals that cross the column of a key
        crossing = int(below[columns].sum())
        return int(self._of_column[columns].sum() + self._of_diagonal[diagonals].sum()) - crossing

    def a_shape(self, sink: int) -> _Lines:
        """The first keys and as many of the nearest distances as the budget allows."""
        position = np.arange(self._length)
        columns = position < sink
        few, many = 0, self._length
        while few < many:
            middle = (few + many + 1) // 2
            fits = self.pairs_of(_Lines(columns, position < middle)) <= self._most
            few, many = (middle, many) if fits else (few, middle - 1)
        return _Lines(columns, position < few)

    def lines(self, received: np.ndarray, diagonal: np.ndarray) -> _Lines:
        """The columns and diagonals with most mass per pair that fit into the budget together.

        Where they cross they share a pair, so the sum of their pairs may be larger than the budget,
        up to twice: the largest of 17 such sums is taken whose union fits.
        """
        mass = np.concatenate([received, diagonal])
        pairs = np.concatenate([self._of_column, self._of_diagonal])
        for sixteenths in range(32, 16, -1):
            taken = self._fitting(mass, pairs, self._most * sixteenths // 16)
            lines = _Lines(taken[: self._length], taken[self._length :])
            if self.pairs_of(lines) <= self._most:
                return lines
        taken = self._fitting(mass, pairs, self._most)
        return _Lines(taken[: self._length], taken[self._length :])

    def blocks(self, block_mass: np.ndarray) -> tuple[float, int]:
        """Mass, as a mean over rows, and pairs of the blocks with most mass per pair that fit."""
        mass = block_mass * self._rows[:, None]
        pairs = self._of_block
        taken = self._fitting(mass.ravel(), pairs.ravel(), self._most).reshape(pairs.shape)
        return float(mass[taken].sum() / self._length), int(pairs[taken].sum())

    def _fitting(self, mass: np.ndarray, pairs: np.ndarray, most: int) -> np.ndarray:
        """bool: taken in the order of mass per pair, those passed over that no longer fit."""
        worth = np.where(pairs > 0, mass / np.maximum(pairs, 1), -np.inf)
        taken, left = np.zeros(len(mass), bool), most
        for place in np.argsort(-worth, kind="stable"):
            if worth[place] <= 0:
                break
            if pairs[place] <= left:
                taken[place] = True
                left -= pairs[place]
        return taken


def _mass_of_lines(
    trace: AttentionTrace, layer: int, head: int, patterns: Sequence[_Lines]
) -> list[float]:
    """Mass inside each pattern, mean over rows; a panel of probabilities is in memory at a time."""
    inside = np.zeros(len(patterns))
    for start in range(0, trace.length, _PANEL):
        stop = min(start + _PANEL, trace.length)
        panel = trace.tile(layer, head, (start, stop), (0, stop))
        rows = np.arange(start, stop)
        for number, pattern in enumerate(patterns):
            inside[number] += (panel * pattern.inside(rows)[:, :stop]).sum()
    return (inside / trace.length).tolist()
