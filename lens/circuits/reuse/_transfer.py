"""Each circuit run on each task: does the circuit of one do the other's, which overlap does not say?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.circuit import Circuit
from lens.circuits.reuse._sides import with_heads_renamed
from lens.common.choices import Count, Seed, check_lists
from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence, with_ends
from lens.models.loaded import LoadedModel
from lens.stats.controls import jaccard, p_value
from lens.tasks.task import Task


@dataclass(frozen=True, repr=False, eq=False)
class Transfer(Result):
    """Faithfulness of circuits on tasks, beside circuits whose heads were renamed within their layers.

    Attributes:
        faithfulness, low, high: [circuits, tasks], with the 95 % bootstrap interval over prompts (NaN for
            one prompt).
        renamed: [circuits, tasks, draws], faithfulness with the heads of the circuit renamed; NaN for a draw that is the
            circuit itself, as all are where no layer has heads that could change places.
        shared: [circuits, circuits], Jaccard index of the edges.
        circuits, tasks: names; a circuit is called after the task that it was made for.
        model: its name.
    """

    faithfulness: np.ndarray
    low: np.ndarray
    high: np.ndarray
    renamed: np.ndarray
    shared: np.ndarray
    circuits: tuple[str, ...]
    tasks: tuple[str, ...]
    model: str

    def table(self) -> pd.DataFrame:
        """One row per circuit and task.

        Columns: `circuit`, `task`, `faithfulness`, `low`, `high`, `renamed` (mean over draws), `p`:
        (1 + renamed circuits that are as faithful) / (1 + draws); both NaN without a draw.
        """
        rows = []
        for number, circuit in enumerate(self.circuits):
            for other, task in enumerate(self.tasks):
                at = number, other
                drawn, value = self.renamed[at], self.faithfulness[at]
                drawn = drawn[~np.isnan(drawn)]
                beside = (drawn.mean(), p_value(value, drawn)) if len(drawn) else (np.nan, np.nan)
                found = (value, self.low[at], self.high[at], *beside)
                rows.append((circuit, task, *found))
        columns = ["circuit", "task", "faithfulness", "low", "high", "renamed", "p"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def findings(self) -> tuple[Sentence, ...]:
        """Of each circuit its faithfulness on every task, beside circuits whose heads are renamed ("transfer")."""
        said, table = [], self.table()
        for number, circuit in enumerate(self.circuits):
            rows = table[number * len(self.tasks) :][: len(self.tasks)]
            on = "; ".join(
                f"on {row['task']} {with_ends(row, 'faithfulness', '.2f', plain=True)}"
                + (
                    f" (its heads renamed within their layers {row['renamed']:.2f}, p = {row['p']:.2f})"
                    if row["p"] == row["p"]
                    else " (no heads that could be renamed within their layers)"
                )
                for row in rows.to_dict("records")
            )
            said.append(
                Sentence(f"The circuit of {circuit} has a faithfulness {on}.", kind="transfer")
            )
        return tuple(said)

    def __repr__(self) -> str:
        shown = "; ".join(
            f"{row['circuit']!r} on {row['task']!r} {row['faithfulness']:.2f}"
            for row in self.table().head(4).to_dict("records")
        )
        return f"Transfer({len(self.circuits)} circuits × {len(self.tasks)} tasks, {self.model}: {shown})"


def transfer(
    model: LoadedModel,
    tasks: Sequence[Task],
    circuits: Sequence[Circuit],
    *,
    draws: Count = 10,
    seed: Seed = 0,
    progress: bool = True,
) -> Transfer:
    """Run every circuit on every task.

    Args:
        model: that of the circuits.
        tasks: prompts that the circuits were not made from, if the numbers shall say more than the fit.
        circuits: of one graph and one ablation.
        draws: of circuits with renamed heads, the same ones for all tasks.
        seed: of these and of the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: no task, no circuit, no draw, circuits of several graphs or ablations, another model's,
            or a task that ablation does not change.

    Reference: Hanna, Pezzelle, Belinkov 2024, arXiv 2403.17806: overlap of nodes does not predict
        faithfulness on the other task.

    Example:
        >>> tasks = [copying, lens.tasks.induction(small, n=4, seed=1)]
        >>> circuits = [lens.circuits.score_edges(small, one).top(20) for one in tasks]
        >>> lens.circuits.reuse.transfer(small, tasks, circuits).table()
    """
    check_lists(tasks=tasks, circuits=circuits)
    tasks = [given_as("Task", tasks=one) for one in tasks]
    circuits = [given_as("Circuit", circuits=one) for one in circuits]
    if not len(tasks) or not len(circuits):
        raise LensError(
            f"transfer needs tasks and circuits, got {len(tasks)} tasks and {len(circuits)} circuits"
        )
    graph, ablation = circuits[0].graph, circuits[0].ablation
    if any(one.graph != graph or one.ablation != ablation for one in circuits):
        raise LensError(
            "the circuits are of different graphs or ablations, so their numbers do not compare"
        )
    draw = np.random.default_rng(seed)
    kept = [one.kept for one in circuits]
    others = [with_heads_renamed(graph, one.kept, draw) for one in circuits for _ in range(draws)]
    same = np.array([(one == kept[n // draws]).all() for n, one in enumerate(others)])
    kept += others
    found = []
    for task in tasks:
        outcome = run_circuits(model, task, np.stack(kept), ablation, progress=progress)
        found.append((outcome.faithfulness(), *outcome.interval(seed)))
    values, low, high = np.moveaxis(np.array(found), 0, -1)  # [circuits and their renamed, tasks]
    count = len(circuits)
    drawn = np.where(same[:, None], np.nan, values[count:])
    renamed = np.moveaxis(drawn.reshape(count, draws, len(tasks)), 1, 2)
    shared = jaccard(np.stack([one.kept for one in circuits]))
    made_for, of = tuple(one.task for one in circuits), tuple(task.name for task in tasks)
    return Transfer(
        values[:count], low[:count], high[:count], renamed, shared, made_for, of, model.name
    )
