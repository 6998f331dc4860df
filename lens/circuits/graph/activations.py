"""What every writer of a graph writes in one run, kept small, and what is put in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lens.circuits.graph.graph import Kv
from lens.circuits.graph.nodes import Nodes, project, visit
from lens.common.choices import check_choice
from lens.passes.visit import Visitor

Baseline = Literal["counterfactual", "mean", "zero"]


@dataclass(frozen=True)
class Ablation:
    """How edges are ablated, in the terms in which such numbers are compared.

    Attributes:
        value: what a reader gets instead of a writer's output: "counterfactual", that of the paired
            corrupt prompt; "mean", the mean over the clean prompts at each position; "zero".
        kv: of the graph: whether query heads of a group have keys and values of their own.
        granularity: always "edge".
        positions: "all", or the names of the places of edges at places (`lens.circuits.scores.positions`).
        direction: always "noising": clean prompts, references put in.
        aggregation: always "mean over prompts".
    """

    value: Baseline = "counterfactual"
    kv: Kv = "head"
    granularity: str = "edge"
    positions: str = "all"
    direction: str = "noising"
    aggregation: str = "mean over prompts"

    def __post_init__(self) -> None:
        check_choice("baseline", self.value, Baseline)
        check_choice("kv", self.kv, Kv)


@dataclass(eq=False)
class Activations:
    """Outputs of all writers, `d_model (2 layers + 1)` numbers per token: heads as `z`, before W_O.

    Attributes:
        input: [rows, tokens, d_model], what enters the first layer.
        heads: per layer [rows, heads, tokens, head_dim].
        mlps: per layer [rows, tokens, d_model]; empty without MLPs.
    """

    input: Tensor
    heads: list[Tensor] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)

    def minus(self, other: Activations) -> Activations:
        """Writer by writer the difference."""
        return Activations(
            self.input - other.input,
            [mine - its for mine, its in zip(self.heads, other.heads, strict=True)],
            [mine - its for mine, its in zip(self.mlps, other.mlps, strict=True)],
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """Every output changed alike."""
        heads, mlps = ([change(part) for part in parts] for parts in (self.heads, self.mlps))
        return Activations(change(self.input), heads, mlps)

    def times(self, factor: float) -> Activations:
        """Every output multiplied."""
        return self.each(lambda part: part * factor)

    def rows(self, rows: slice) -> Activations:
        """Those of some rows, a view."""
        return self.each(lambda part: part[rows])

    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(part.numel() for part in (self.input, *self.heads, *self.mlps))


class PlainVisitor(Visitor):
    """Runs the model as it is; each query head reads key and value for itself where the graph says so."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.nodes.layers[layer]
        normed = parts.block.norm.forward(residual)[None]
        q, k, v = (project(parts, part, normed).movedim(0, -2) for part in range(3))
        return q, k, v


class Reading(PlainVisitor):
    """Keeps what is written, with noise on what enters."""

    def __init__(self, nodes: Nodes, noise: Tensor | None = None) -> None:
        super().__init__(nodes)
        self.noise, self.found = noise, Activations(torch.empty(0))

    def enter(self, hidden: Tensor) -> Tensor:
        self.found.input = hidden if self.noise is None else hidden + self.noise
        return self.found.input

    def heads(self, layer: int, z: Tensor) -> Tensor:
        self.found.heads.append(z)
        return z

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        self.found.mlps.append(output)
        return output


def read_activations(
    nodes: Nodes, ids: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Activations]:
    """Logits [rows, tokens, vocab] of a plain run, and what every writer wrote; with noise on what enters.

    Raises:
        LensError: prompts that the model does not take.
    """
    reading = Reading(nodes, noise)
    with torch.no_grad():
        logits = visit(nodes, ids, reading)
    return logits, reading.found
