"""A circuit beside others of as many edges that nobody chose for the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens import stats
from lens.circuits.checks.evaluation import Outcome, run_circuits
from lens.circuits.graph.activations import Ablation, Activations
from lens.circuits.graph.circuit import Circuit
from lens.circuits.graph.mixed import Mixed, mixed_of
from lens.circuits.graph.nodes import Nodes, find_nodes
from lens.circuits.graph.references import References, outputs_of, own_positions
from lens.circuits.graph.selection import random_edges, same_degrees
from lens.circuits.scores.attribution import written
from lens.common.choices import Count, Seed, check_choice, check_lists
from lens.common.given import given_as
from lens.common.results import Result, Sentence, ends
from lens.models.loaded import LoadedModel
from lens.stats.controls import p_value
from lens.tasks.task import Task

Kind = Literal["uniform", "degrees", "magnitude"]
CONTROLS = {
    "uniform": "random ones",
    "degrees": "random ones with the same degrees",
    "magnitude": "those where activations differ most",
}


@dataclass(frozen=True, repr=False, eq=False)
class Control(Result):
    """Faithfulness of a circuit and of its controls, on the same prompts.

    Attributes:
        outcome: of the circuit.
        faithfulness: control -> [draws].
        edges: number in each circuit.
        task: its name.
        seed: of draws and bootstrap.
    """

    outcome: Outcome
    faithfulness: dict[str, np.ndarray]
    edges: int
    task: str
    seed: int

    def p_value(self, control: str) -> float:
        """(1 + draws that are as faithful) / (1 + draws): the least that so few draws can show."""
        return p_value(self.outcome.faithfulness()[0], self.faithfulness[control])

    def table(self) -> pd.DataFrame:
        """One row for the circuit, and one per control.

        Columns: `circuit`, `edges`, `faithfulness` with `low` and `high` (of the circuit the 95 %
        bootstrap interval over prompts, of a control the 2.5th and 97.5th percentile of its draws),
        `draws`, `p` (NaN for the circuit). NaN for the ends of a single prompt, and of a single draw.
        """
        low, high = self.outcome.interval(self.seed)
        rows: list[tuple[Any, ...]] = [
            ("circuit", self.outcome.faithfulness()[0], low[0], high[0], 1, np.nan)
        ]
        for name, drawn in self.faithfulness.items():
            spread = stats.interval(drawn) if len(drawn) > 1 else (np.nan, np.nan)
            rows.append((name, drawn.mean(), *spread, len(drawn), self.p_value(name)))
        columns = ["circuit", "faithfulness", "low", "high", "draws", "p"]
        return pd.DataFrame(rows, columns=columns).assign(edges=self.edges)

    def findings(self) -> tuple[Sentence, ...]:
        """The faithfulness of the circuit, beside that of each control."""
        rows = {row["circuit"]: row for row in self.table().to_dict("records")}
        found = {
            name: f"{row['faithfulness']:.2f}{ends(row['low'], row['high'], '.2f')}"
            for name, row in rows.items()
        }
        others = "; ".join(
            f"{CONTROLS[kind]} {found[kind]} (p = {rows[kind]['p']:.2f})"
            for kind in self.faithfulness
        )
        text = f"The circuit of {self.edges:,} edges has a faithfulness of {found['circuit']}; of as many edges, {others}."
        return (Sentence(text, kind="faithful"),)

    def __repr__(self) -> str:
        drawn = ", ".join(
            f"{name} {values.mean():.3g}" for name, values in self.faithfulness.items()
        )
        return (
            f"Control({self.task!r}: {self.edges:,} edges, faithfulness "
            f"{self.outcome.faithfulness()[0]:.3g}; of controls {drawn})"
        )


def control(
    model: LoadedModel,
    task: Task,
    circuit: Circuit,
    *,
    kinds: Sequence[Kind] = get_args(Kind),
    draws: Count = 20,
    seed: Seed = 0,
    progress: bool = True,
) -> Control:
    """Run a circuit and circuits of as many edges.

        uniform    edges drawn alike
        degrees    each writer is read, and each reader reads, as often as in the circuit
        magnitude  the edges of the writers whose output the ablation changes most (mean norm over
                   prompts and tokens), in random order: what looks only at sizes, not at the task

    Args:
        model, task: those of the circuit, or the same model and other prompts.
        circuit: its ablation is theirs.
        kinds: of controls.
        draws: of each kind.
        seed: of all draws.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown kind, no draw, another graph, or a task that ablation does not change.

    Example:
        >>> circuit = lens.circuits.score_edges(small, copying, progress=False).top(40)
        >>> lens.circuits.checks.control(small, copying, circuit, kinds=["degrees"], draws=3).table()
    """
    circuit = given_as("Circuit", circuit=circuit)
    check_lists(kinds=kinds)
    for kind in kinds:
        check_choice("kinds", kind, Kind)
    graph, draw = circuit.graph, np.random.default_rng(seed)
    sizes = None
    if "magnitude" in kinds:
        sizes = magnitudes(model, task, circuit.ablation)
    kept = [circuit.kept]
    for kind in kinds:
        for _ in range(draws):
            if kind == "uniform":
                kept.append(random_edges(graph, circuit.n, draw))
            elif kind == "degrees":
                kept.append(same_degrees(graph, circuit.kept, draw))
            else:
                assert sizes is not None
                order = np.lexsort((draw.random(graph.n), -sizes[graph.ends[1]]))
                kept.append(np.isin(np.arange(graph.n), order[: circuit.n]))
    found = run_circuits(model, task, np.stack(kept), circuit.ablation, progress=progress)
    values = found.faithfulness()[1:].reshape(len(kinds), draws)
    one = Outcome(found.metric[:1], found.kl[:1], found.full, found.empty)
    return Control(one, dict(zip(kinds, values, strict=True)), circuit.n, task.name, seed)


@torch.no_grad()
def magnitudes(model: LoadedModel, task: Task, ablation: Ablation) -> np.ndarray:
    """[writers], mean over prompts and tokens of the norm of (output - its reference), in the stream.

    Where heads go through a norm before they are added, of what comes out of it when one alone is replaced.
    """
    nodes = mixed_of(model) or find_nodes(model, kv=ablation.kv)
    references, total, count = References(nodes, task, ablation), 0.0, 0
    for rows in task.chunks(min(8, task.rows_at_once(model))):
        found = outputs_of(nodes, task.clean[rows])
        own = own_positions(task, found.input.shape[1])[rows].to(found.input)[:, None]
        count += int(own.sum())
        change = found.minus(references.of(rows))
        norms = [(one.norm(dim=-1) * own).sum((0, 2)) for one in _written(nodes, found, change)]
        total = total + np.concatenate([part.cpu().double().numpy() for part in norms])
    return np.asarray(total) / count


def _written(nodes: Nodes | Mixed, found: Activations, change: Activations) -> Iterator[Tensor]:
    """[rows, writers, tokens, d_model] of some writers at a time, in the order of the graph."""
    yield change.input[:, None]
    for number, heads in enumerate(change.heads):
        if isinstance(nodes, Mixed):
            yield nodes.moved(number, found.heads[number], heads)
            continue
        own, block = written(nodes, change, number), nodes.layers[number].block
        if block.after.changes:
            whole = block.attended(found.heads[number])[:, None]
            alone = block.after.forward(whole) - block.after.forward(
                whole - own[:, : heads.shape[1]]
            )
            own = torch.cat([alone, own[:, heads.shape[1] :]], 1)
        yield own
