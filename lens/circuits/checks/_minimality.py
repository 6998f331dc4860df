"""Minimality: is every node of a circuit needed?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens import stats
from lens.circuits.checks.evaluation import check_changes, ratio, run_circuits
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.selection import random_edges, without
from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence, by_size
from lens.models.loaded import LoadedModel
from lens.stats.intervals import columns
from lens.stats.verdicts import leave_out_0
from lens.tasks.task import Task


@dataclass(frozen=True, repr=False, eq=False)
class Minimality(Result):
    """What each node adds to a circuit.

    Attributes:
        nodes: writers of the circuit.
        drops: [nodes, prompts], F(C without K) - F(C without K and the node), larger is better.
        given: [nodes] the set K of each.
        random: [draws], mean drop when a random head or MLP leaves a random circuit of as many edges.
        full, empty: [prompts], metric of the whole model, and with every edge ablated.
        metric, task: names.
        seed: of draws and bootstrap.
    """

    nodes: tuple[str, ...]
    drops: np.ndarray
    given: tuple[tuple[str, ...], ...]
    random: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    metric: str
    task: str
    seed: int

    @property
    def whole(self) -> float:
        """Mean change of the metric when every edge is ablated."""
        return float((self.full - self.empty).mean())

    @property
    def shares(self) -> np.ndarray:
        """[nodes], mean drop as a share of `whole`; negative: the circuit is better without it.

        Raises:
            LensError: ablating every edge does not change the metric.
        """
        return ratio(self.drops.mean(1), self.whole)

    def needed(self, share: float = 0.01) -> tuple[str, ...]:
        """Nodes whose drop is at least this share of `whole` by size (1 % in Wang et al.)."""
        return tuple(
            name for name, size in zip(self.nodes, self.shares, strict=True) if abs(size) >= share
        )

    def table(self) -> pd.DataFrame:
        """One row per node, largest drop by size first; errors as of `shares`.

        Columns: `node`, `given` (names of K), `drop` with `low` and `high` (95 % bootstrap interval over
        prompts), `share` (of `whole`), `random` (95th percentile of the sizes of the random drops).
        """
        rows = pd.DataFrame(
            {
                "node": self.nodes,
                "given": [", ".join(names) for names in self.given],
                **columns("drop", self.drops, self.seed, plain=True, shares=False),
                "share": self.shares,
                "random": stats.quantile(np.abs(self.random), 0.95),
            }
        )
        return by_size(rows, "drop")

    def findings(self) -> tuple[Sentence, ...]:
        """How many parts are needed, and which do most by size, beside parts of random circuits."""
        rows = self.table()
        needed = rows["node"].isin(self.needed())
        clear = int((needed & leave_out_0(rows["low"], rows["high"])).sum())
        apart = (
            ""
            if rows["low"].isna().all()
            else f", {clear} of them with an interval that excludes 0"
        )
        records = rows.head(4).to_dict("records")
        best = ", ".join(f"{row['node']} {row['share']:.0%}" for row in records)
        text = (
            f"{needed.sum()} of the {len(self.nodes)} heads and MLPs that were taken out of it change the task "
            f"by at least 1 %{apart}; most do {best} (of {len(self.random)} parts of random circuits 95 % at most "
            f"{rows['random'].iloc[0] / abs(self.whole):.1%})."
        )
        return (Sentence(text, kind="needed"),)

    def __repr__(self) -> str:
        return (
            f"Minimality({self.task!r}, {len(self.full)} prompts: {len(self.needed())} of "
            f"{len(self.nodes)} nodes change at least 1 % of {self.whole:.3g} {self.metric})"
        )


def minimality(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    nodes: Sequence[str] | None = None,
    given: Mapping[str, Sequence[str]] | None = None,
    draws: Count = 20,
    seed: Seed = 0,
    progress: bool = True,
) -> Minimality:
    """Take each head and MLP out of a circuit.

    Args:
        model, task: those of the circuit, or the same model and other prompts.
        circuit: its ablation replaces what is taken out.
        nodes: those to try; all of the circuit if not given.
        given: for some nodes a set K that is out already, such as the backups of the same class.
        draws: of random circuits of as many edges, out of each of which a random head or MLP is taken.
        seed: of these draws.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: no node, an unknown one in `given`, no random draw, another graph, or a task that ablation does not
            change.

    Reference: Wang et al. 2022, arXiv 2211.00593.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(40)
        >>> lens.circuits.checks.minimality(small, copying, circuit, draws=3).needed()
    """
    circuit = given_as("Circuit", circuit=circuit)
    inside = tuple(name for name in circuit.nodes if name != "input")
    if not inside:
        raise LensError("the circuit has no heads and no MLPs, so there is no node to take out")
    nodes = inside if nodes is None else tuple(nodes)
    if not nodes or set(nodes) - set(inside):
        raise LensError(
            f"nodes must be heads and MLPs of the circuit, such as {inside[0]!r}; got {list(nodes)}"
        )
    sets = {name: tuple(names) for name, names in (given or {}).items()}
    if unknown := set(sets) - set(nodes):
        raise LensError(f"given names {min(unknown)!r}, which is no node of the circuit")
    graph, draw = circuit.graph, np.random.default_rng(seed)
    before = [without(graph, circuit.kept, sets.get(name, ())) for name in nodes]
    after = [without(graph, kept, [name]) for kept, name in zip(before, nodes, strict=True)]
    plain, reduced = [], []
    for _ in range(draws):
        writers = np.empty(0, int)
        while not len(writers):  # `input` is none of the parts that are taken out
            drawn = random_edges(graph, circuit.n, draw)
            writers = np.unique(graph.ends[1][drawn])
            writers = writers[writers > 0]
        plain.append(drawn)
        reduced.append(without(graph, drawn, [graph.writers[draw.choice(writers)]]))
    common = {names: number for number, names in enumerate(dict.fromkeys(sets.values()))}
    starts = [circuit.kept, *(without(graph, circuit.kept, names) for names in common)]
    kept = np.stack([*starts, *after, *plain, *reduced])
    found = run_circuits(model, task, kept, circuit.ablation, progress=progress)
    start, after_, plain_, reduced_ = np.split(
        found.metric, np.cumsum([len(starts), len(nodes), draws])
    )
    base = [1 + common[sets[name]] if name in sets else 0 for name in nodes]
    drops, apart = start[base] - after_, tuple(sets.get(name, ()) for name in nodes)
    by_chance = (plain_ - reduced_).mean(1)
    check_changes(float((found.full - found.empty).mean()))
    return Minimality(
        nodes, drops, apart, by_chance, found.full, found.empty, task.metric, task.name, seed
    )
