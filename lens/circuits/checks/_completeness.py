"""Completeness: does the circuit still do what the model does when parts of both are taken away?

A circuit can be faithful and yet miss backups that step in when a part is gone. So sets K of its nodes
are ablated in the circuit and in the whole model; F(C without K) must stay near F(M without K).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.circuits.checks.evaluation import check_changes, run_circuits
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.selection import without
from lens.common.choices import Count, Seed, check_counts
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence, counted, ends, few
from lens.models.loaded import LoadedModel
from lens.stats.intervals import columns
from lens.stats.verdicts import of_many
from lens.tasks.task import Task

_TRIES = 20  # to draw a set that is not there yet


@dataclass(frozen=True, repr=False, eq=False)
class Completeness(Result):
    """Metric of circuit and model without sets of nodes.

    Attributes:
        kind: of each set: "none" (nothing taken away), "greedy" (the largest gap that a greedy run met on its way)
            or "random" (of the size of one of those).
        sets: writers taken away.
        circuit, model: [sets, prompts], metric of either without the set, larger is better.
        full, empty: [prompts], metric of the whole model, and with every edge ablated.
        tried: number of sets that the greedy runs looked at.
        metric, task: names.
        seed: of draws and bootstrap.
    """

    kind: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    circuit: np.ndarray
    model: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    tried: int
    metric: str
    task: str
    seed: int

    @property
    def gaps(self) -> np.ndarray:
        """[sets], mean over prompts of F(M without K) - F(C without K), in units of the metric."""
        return (self.model - self.circuit).mean(1)

    @property
    def worst(self) -> int:
        """Number of the set with the largest gap by size."""
        return int(np.abs(self.gaps).argmax())

    @property
    def incompleteness(self) -> float:
        """Largest gap by size, as a share of what ablating everything changes."""
        return float(np.abs(self.gaps).max() / abs((self.full - self.empty).mean()))

    def table(self) -> pd.DataFrame:
        """One row per set.

        Columns: `kind`, `removed` (names), `size`, `model` and `circuit` (means of the metric), `gap`
        (model - circuit) with `low` and `high` (95 % bootstrap interval over prompts).
        """
        return pd.DataFrame(
            {
                "kind": self.kind,
                "removed": [", ".join(names) for names in self.sets],
                "size": [len(names) for names in self.sets],
                "model": self.model.mean(1),
                "circuit": self.circuit.mean(1),
                **columns("gap", self.model - self.circuit, self.seed, plain=True, shares=False),
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """The largest gap between model and circuit, beside random sets of heads of that size ("complete")."""
        table = self.table()
        row = table.iloc[self.worst]
        many = 1 + self.tried + self.kind.count("random")
        found = of_many(row["gap"], row["low"], row["high"], many, self.model.shape[1])
        interval = ends(*found, "+.3g")
        others = table.drop(index=self.worst)  # it may be a random one itself
        alike = others.query("kind == 'random' and size == @row['size']")["gap"].abs()
        beside = (
            f"{counted(len(alike), 'random one')} of that size by {alike.mean():.3g} on average"
            if len(alike)
            else "there is no random one of that size beside it"
        )
        text = (
            f"Without {few(self.sets[self.worst]) or 'nothing'} model and circuit differ by {row['gap']:+z.3g}{interval} "
            f"{self.metric}, {self.incompleteness:.0%} of what ablating everything changes: the largest gap of {many} sets, "
            f"looked for on the prompts it is of ({len(self.full)}); {beside}."
        )
        return (Sentence(text, kind="complete"),)

    def __repr__(self) -> str:
        worst = self.worst
        return (
            f"Completeness({self.task!r}, {len(self.full)} prompts: largest gap {self.gaps[worst]:.3g} "
            f"{self.metric} ({self.incompleteness:.0%} of what ablating everything changes) without "
            f"{', '.join(self.sets[worst]) or 'nothing'}; {len(self.sets)} sets)"
        )


def completeness(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    runs: Count = 10,
    steps: Count = 10,
    candidates: Count = 10,
    draws: int = 10,
    seed: Seed = 0,
    progress: bool = True,
) -> Completeness:
    """Look for sets of heads without which circuit and model differ most.

    Each greedy run begins with nothing taken away; in each step it draws candidates among the heads of
    the circuit and takes the one that makes `|F(M without K) - F(C without K)|` largest. Of each run the
    set with the largest gap on its way is kept. The sets are looked for on the prompts on which they are
    reported, so the gap is rather too large than too small.

    Args:
        model, task: those of the circuit, or the same model and other prompts.
        circuit: its ablation replaces what is taken away.
        runs, steps, candidates: of the greedy search; where the circuit has no more heads than `candidates`, all
            runs would be one, and one is made.
        draws: of other sets of the sizes of the greedy ones, without a search; fewer where there are no more.
        seed: of all draws.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: counts that are not positive, a circuit without heads, or one of another graph, or a task that
            ablation does not change.

    Reference: Wang et al. 2022, arXiv 2211.00593.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(40)
        >>> lens.circuits.checks.completeness(small, copying, circuit, runs=2, steps=2, draws=2).worst
        1
    """
    circuit = given_as("Circuit", circuit=circuit)
    check_counts(0, draws=draws)
    heads = [name for name in circuit.nodes if name.startswith("a")]
    if not heads:
        raise LensError(
            "the circuit has no heads to take away; give one with at least one edge that leaves a head"
        )
    draw, graph = np.random.default_rng(seed), circuit.graph
    runs = runs if candidates < len(heads) else 1

    def gaps(sets: list[tuple[str, ...]]) -> tuple[np.ndarray, ...]:
        everything = np.ones(graph.n, bool)
        kept = [without(graph, circuit.kept, names) for names in sets]
        kept += [without(graph, everything, names) for names in sets]
        found = run_circuits(model, task, np.stack(kept), circuit.ablation, progress=progress)
        return found.metric[: len(sets)], found.metric[len(sets) :], found.full, found.empty

    at: list[tuple[str, ...]] = [() for _ in range(runs)]
    met: list[list[tuple[float, tuple[str, ...]]]] = [[] for _ in range(runs)]
    looked_at = set()
    for _ in range(min(steps, len(heads))):
        tried, of = [], []
        for number, names in enumerate(at):
            left = [name for name in heads if name not in names]
            for name in draw.permutation(left)[:candidates]:
                tried.append((*names, str(name)))
                of.append(number)
        inside, outside, *_ = gaps(tried)
        sizes = np.abs((outside - inside).mean(1))
        for number in range(runs):
            mine = np.flatnonzero(np.array(of) == number)
            best = mine[sizes[mine].argmax()]
            at[number] = tried[best]
            met[number].append((float(sizes[best]), tried[best]))
        looked_at |= {frozenset(names) for names in tried}
    chosen = [max(one, key=lambda found: found[0])[1] for one in met]
    drawn = _others(heads, chosen, draws, draw)
    sets = [(), *chosen, *drawn]
    inside, outside, full, empty = gaps(sets)
    check_changes(float((full - empty).mean()))
    kinds = ("none", *["greedy"] * runs, *["random"] * len(drawn))
    return Completeness(
        kinds,
        tuple(sets),
        inside,
        outside,
        full,
        empty,
        len(looked_at),
        task.metric,
        task.name,
        seed,
    )


def _others(
    heads: list[str], chosen: list[tuple[str, ...]], draws: int, draw: np.random.Generator
) -> list[tuple[str, ...]]:
    """Random sets of the sizes of the chosen ones in turn, each once and none of them."""
    seen, found = {frozenset(names) for names in chosen}, []
    for number in range(draws):
        size = len(chosen[number % len(chosen)])
        for _ in range(_TRIES):
            names = tuple(map(str, draw.permutation(heads)[:size]))
            if frozenset(names) not in seen:
                seen.add(frozenset(names))
                found.append(names)
                break
    return found
