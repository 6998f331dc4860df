"""Patching by position: the residual stream, all heads or the MLP of each layer, at each token, one at a time.

The map that causal tracing draws (Meng et al. 2022, arXiv 2202.05262): how much of the answer a clean state brings
back into a run whose prompt is corrupt, or whose embeddings have noise on them; or takes out of a clean run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lens.circuits.graph.activations import PlainVisitor
from lens.circuits.graph.nodes import Nodes, find_nodes, visit
from lens.circuits.patches.effects import Direction, PatchEffects, effects_of, measured, places_of
from lens.common.choices import check_counts, is_number
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.stats.controls import drawing
from lens.tasks.task import Task

Sublayers = Literal["residual", "attention", "mlp"]
_LETTERS = {"residual": "r", "attention": "a", "mlp": "m"}
_ROWS = 8


@dataclass(frozen=True)
class Run:
    """One run of some prompts: ids [rows, tokens], and noise [rows, tokens, d_model] on what enters, or None."""

    ids: Tensor
    noise: Tensor | None = None


class _States(PlainVisitor):
    """Keeps what one kind of sub-layer writes, or puts what is given in its place where it is asked to."""

    def __init__(self, nodes: Nodes, what: Sublayers, noise: Tensor | None) -> None:
        super().__init__(nodes)
        self.what, self.noise = what, noise
        self.found: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}
        self.where = torch.zeros(1, 1, dtype=torch.bool)

    def enter(self, hidden: Tensor) -> Tensor:
        return hidden if self.noise is None else hidden + self.noise

    def residual_in(self, layer: int, hidden: Tensor) -> Tensor:
        return self._state("residual", layer, hidden, self.where[..., None])

    def heads(self, layer: int, z: Tensor) -> Tensor:
        return self._state("attention", layer, z, self.where[:, None, :, None])

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        return self._state("mlp", layer, output, self.where[..., None])

    def _state(self, what: Sublayers, layer: int, own: Tensor, where: Tensor) -> Tensor:
        if what != self.what:
            return own
        self.found[layer] = own
        return self.given[layer].where(where, own) if layer in self.given else own


def patch_streams(
    model: LoadedModel,
    task: Task,
    what: Sublayers,
    direction: Direction,
    positions: str | None,
    noise: float | None,
    noise_at: str | None,
    window: int,
    seed: int,
    progress: bool,
) -> PatchEffects:
    """`lens.circuits.patch` with a word for its nodes."""
    check_counts(window=window)
    if what == "residual" and window != 1:
        raise LensError(
            "window is for 'attention' and 'mlp': one layer's stream holds all before it"
        )
    check_noise(task, noise, noise_at)
    task.check(model)
    nodes, places = find_nodes(model), places_of(task, positions)
    layers = [
        number for number, block in enumerate(nodes.layout.blocks) if what != "mlp" or block.mlp
    ]
    if not layers:
        raise LensError(f"{model.name} has no MLPs to patch; patch 'residual' or 'attention'")
    values, ends = [], []
    with torch.no_grad(), advancing(f"{model.name}: patching", task.n, progress) as advance:
        for rows, clean, other in pairs(nodes, task, noise, noise_at, seed):
            into, source = (clean, other) if direction == "noising" else (other, clean)
            base, _ = _kept(nodes, what, into)
            whole, states = _kept(nodes, what, source)
            ends.append(torch.stack([measured(task, one, rows) for one in (base, whole)]))
            read = [
                torch.stack(
                    [
                        measured(task, _patched(nodes, what, into, states, near, where[rows]), rows)
                        for _, where in places
                    ]
                )
                for near in (_near(layer, layers, window) for layer in layers)
            ]
            values.append(torch.stack(read).numpy())
            advance(len(rows))
    names = tuple(f"{_LETTERS[what]}{layer}" for layer in layers)
    return effects_of(model, task, names, places, values, ends, direction, (), seed)


def check_noise(task: Task, noise: float | None, noise_at: str | None) -> None:
    """Raises LensError: no noise where it has a place, no number above 0, or no mark of the task."""
    if noise is None and noise_at is not None:
        raise LensError("noise_at says where noise is; give noise, e.g. noise=3.0")
    if noise is not None and not (is_number(noise) and 0 < noise < float("inf")):
        raise LensError(f"noise must be a number above 0 such as 3.0, got {noise!r}")
    if noise_at is not None and noise_at not in [*task.marks]:
        raise LensError(
            f"noise_at must be a mark of the task ({', '.join(task.marks) or 'it has none'}), got {noise_at!r}"
        )


def _near(layer: int, layers: list[int], window: int) -> list[int]:
    """As many layers as the window has, this one in their middle; fewer at the ends."""
    first = layer - (window - 1) // 2
    return [one for one in layers if first <= one < first + window]


def _kept(nodes: Nodes, what: Sublayers, run: Run) -> tuple[Tensor, dict[int, Tensor]]:
    states = _States(nodes, what, run.noise)
    return visit(nodes, run.ids, states), states.found


def _patched(
    nodes: Nodes,
    what: Sublayers,
    run: Run,
    given: dict[int, Tensor],
    layers: list[int],
    where: Tensor,
) -> Tensor:
    states = _States(nodes, what, run.noise)
    states.given, states.where = {layer: given[layer] for layer in layers}, where
    return visit(nodes, run.ids, states)


def pairs(
    nodes: Nodes, task: Task, noise: float | None, noise_at: str | None, seed: int
) -> Iterator[tuple[Tensor, Run, Run]]:
    """Rows, the run of the clean prompts, and that of the corrupt ones or with noise."""
    task.refuse_lengths("patching")
    corrupt = task.clean if noise is not None else task.corrupt_or_refuse()
    (_, where), *_ = places_of(task, noise_at)
    chunks = [*task.chunks(min(_ROWS, task.rows_at_once(nodes.model)))]
    if noise is None:
        yield from ((rows, Run(task.clean[rows]), Run(corrupt[rows])) for rows in chunks)
        return
    device = nodes.model.device
    every = [nodes.layout.embed({"input_ids": task.clean[rows].to(device)}) for rows in chunks]
    size = noise * torch.cat(every).std()
    for rows, entering in zip(chunks, every, strict=True):
        drawn = [
            drawing(seed, *ids).normal(size=entering.shape[1:]) for ids in task.clean[rows].tolist()
        ]
        added = torch.from_numpy(np.stack(drawn)).to(entering) * size
        yield (
            rows,
            Run(task.clean[rows]),
            Run(task.clean[rows], added * where[rows][..., None].to(entering)),
        )
