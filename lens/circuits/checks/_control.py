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
from lens.common.results import Result, Sentence, with_ends
from lens.models.loaded import LoadedModel
from lens.stats.controls import p_value
from lens.tasks.task import Task

Kind = Literal["uniform", "degrees", "magnitude"]
CONTROLS = {
    "uniform": "random ones",
    "degrees": "random ones with the same degrees",
    "magnitude": "random ones, likelier where activations differ more",
}


@dataclass(frozen=True, repr=False, eq=False)
class Control(Result):
    """Faithfulness of a circuit and of its controls, on the same prompts.

    Attributes:
        outcome: of the circuit.
        faithfulness: control -> [draws] of other circuits; none where the circuit is the only one of its kind.
        apart: control -> share of the circuit's edges that a draw has not, mean over draws; NaN without any.
        edges: number in each circuit.
        task: its name.
        seed: of draws and bootstrap.
    """

    outcome: Outcome
    faithfulness: dict[str, np.ndarray]
    apart: dict[str, float]
    edges: int
    task: str
    seed: int

    def p_value(self, control: str) -> float:
        """(1 + draws that are as faithful) / (1 + draws): the least that so few draws can show; NaN without any."""
        drawn = self.faithfulness[control]
        return p_value(self.outcome.faithfulness()[0], drawn) if len(drawn) else float("nan")

    def table(self) -> pd.DataFrame:
        """One row for the circuit, and one per control.

        Columns: `circuit`, `edges`, `faithfulness` with `low` and `high` (of the circuit the 95 %
        bootstrap interval over prompts, of a control the 2.5th and 97.5th percentile of its draws),
        `draws`, `p` and `apart` (share of the circuit's edges that the draws have not; both NaN for the circuit). NaN
        for the ends of a single prompt, and of a single draw.
        """
        low, high = self.outcome.interval(self.seed)
        rows: list[tuple[Any, ...]] = [
            ("circuit", self.outcome.faithfulness()[0], low[0], high[0], 1, np.nan, np.nan)
        ]
        for name, drawn in self.faithfulness.items():
            spread = stats.interval(drawn) if len(drawn) > 1 else (np.nan, np.nan)
            mean = drawn.mean() if len(drawn) else np.nan
            rows.append((name, mean, *spread, len(drawn), self.p_value(name), self.apart[name]))
        columns = ["circuit", "faithfulness", "low", "high", "draws", "p", "apart"]
        return pd.DataFrame(rows, columns=columns).assign(edges=self.edges)

    def findings(self) -> tuple[Sentence, ...]:
        """The faithfulness of the circuit, beside that of each control."""
        rows = {row["circuit"]: row for row in self.table().to_dict("records")}
        found = {
            name: with_ends(row, "faithfulness", ".2f", plain=True) for name, row in rows.items()
        }
        others = "; ".join(
            f"{CONTROLS[kind]} {found[kind]} (p = {rows[kind]['p']:.2f}; {self.apart[kind]:.0%} other edges)"
            if len(drawn)
            else f"no other circuit is there for {CONTROLS[kind]}"
            for kind, drawn in self.faithfulness.items()
        )
        text = f"The circuit of {self.edges:,} edges has a faithfulness of {found['circuit']}; of as many edges, {others}."
        return (Sentence(text, kind="faithful"),)

    def __repr__(self) -> str:
        drawn = ", ".join(
            f"{name} {values.mean():.3g}" if len(values) else f"{name} none"
            for name, values in self.faithfulness.items()
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
        magnitude  edges drawn in proportion to how much the ablation changes their writer's output (mean norm
                   over prompts and tokens): what looks only at sizes, not at the task

    A draw that is the circuit itself is left out: where no two edges can change ends, no other circuit has its degrees.

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
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for kind, others in kept.items():
        for _ in range(draws):
            if kind == "uniform":
                one = random_edges(graph, circuit.n, draw)
            elif kind == "degrees":
                one = same_degrees(graph, circuit.kept, draw)
            else:
                assert sizes is not None
                one = _weighted(sizes[graph.ends[1]], circuit.n, draw)
            if (one != circuit.kept).any():
                others.append(one)
    drawn = [one for others in kept.values() for one in others]
    found = run_circuits(
        model, task, np.stack([circuit.kept, *drawn]), circuit.ablation, progress=progress
    )
    counts = np.cumsum([len(others) for others in kept.values()])
    values = np.split(found.faithfulness()[1:], counts[:-1])
    apart = {
        kind: float(np.mean([(circuit.kept & ~one).sum() / circuit.n for one in others]))
        if others
        else float("nan")
        for kind, others in kept.items()
    }
    own = Outcome(found.metric[:1], found.kl[:1], found.full, found.empty)
    return Control(own, dict(zip(kept, values, strict=True)), apart, circuit.n, task.name, seed)


def _weighted(weights: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """[edges] whether drawn, `count` in all, each draw in proportion to the weights of what is left.

    Reference: Efraimidis and Spirakis 2006, Information Processing Letters 97.
    """
    with np.errstate(divide="ignore"):
        order = np.lexsort(
            (draw.random(len(weights)), draw.exponential(size=len(weights)) / weights)
        )
    return np.isin(np.arange(len(weights)), order[:count])


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
