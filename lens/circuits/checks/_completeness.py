"""Completeness: does the circuit still do what the model does when parts of both are taken away?

A circuit can be faithful and yet miss backups that step in when a part is gone. So sets K of its nodes
are ablated in the circuit and in the whole model; F(C without K) must stay near F(M without K).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.selection import without
from lens.common.choices import Count, Seed, check_counts
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result
from lens.models.loaded import LoadedModel
from lens.stats.intervals import columns
from lens.tasks.task import Task


@dataclass(frozen=True, repr=False, eq=False)
class Completeness(Result):
    """Metric of circuit and model without sets of nodes.

    Attributes:
        kind: of each set: "none" (nothing taken away), "greedy" or "random".
        sets: writers taken away.
        circuit, model: [sets, prompts], metric of either without the set, larger is better.
        full, empty: [prompts], metric of the whole model, and with every edge ablated.
        metric, task: names.
        seed: of draws and bootstrap.
    """

    kind: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    circuit: np.ndarray
    model: np.ndarray
    full: np.ndarray
    empty: np.ndarray
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
                **columns("gap", self.model - self.circuit, self.seed, plain=True),
            }
        )

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
    the circuit and takes the one that makes `|F(M without K) - F(C without K)|` largest. The sets are
    looked for on the prompts on which they are reported, so the gap is rather too large than too small.

    Args:
        model, task: those of the circuit, or the same model and other prompts.
        circuit: its ablation replaces what is taken away.
        runs, steps, candidates: of the greedy search.
        draws: of sets of the same size, without a search.
        seed: of all draws.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: counts that are not positive, a circuit without heads, or one of another graph.

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
    steps = min(steps, len(heads))

    def gaps(sets: list[tuple[str, ...]]) -> tuple[np.ndarray, ...]:
        everything = np.ones(graph.n, bool)
        kept = [without(graph, circuit.kept, names) for names in sets]
        kept += [without(graph, everything, names) for names in sets]
        found = run_circuits(model, task, np.stack(kept), circuit.ablation, progress=progress)
        return found.metric[: len(sets)], found.metric[len(sets) :], found.full, found.empty

    chosen: list[tuple[str, ...]] = [() for _ in range(runs)]
    for _ in range(steps):
        tried, of = [], []
        for number, names in enumerate(chosen):
            left = [name for name in heads if name not in names]
            for name in draw.permutation(left)[:candidates]:
                tried.append((*names, str(name)))
                of.append(number)
        inside, outside, *_ = gaps(tried)
        sizes = np.abs((outside - inside).mean(1))
        for number in range(runs):
            mine = np.flatnonzero(np.array(of) == number)
            chosen[number] = tried[mine[sizes[mine].argmax()]]
    drawn = [tuple(map(str, draw.permutation(heads)[:steps])) for _ in range(draws)]
    sets = [(), *chosen, *drawn]
    inside, outside, full, empty = gaps(sets)
    kinds = ("none", *["greedy"] * runs, *["random"] * draws)
    return Completeness(
        kinds, tuple(sets), inside, outside, full, empty, task.metric, task.name, seed
    )
