"""Activation patching and path patching: outputs of one run put into another, on the masked forward pass.

Noising puts what the corrupt prompt makes into the clean run and asks what is necessary; denoising puts
what the clean prompt makes into the corrupt run and asks what is enough. They differ: of two inputs that
are both needed, noising either breaks the task and denoising either repairs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from lens.circuits.graph.activations import Activations, PlainVisitor, read_activations
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import Nodes, find_nodes, visit
from lens.circuits.graph.spans import EACH
from lens.circuits.patches.effects import Direction, PatchEffects, effects_of, measured, places_of
from lens.circuits.patches.streams import Run, Sublayers, check_noise, pairs, patch_streams
from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, node_of_head, one_or_more
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

_COPIES = 32
_Pair = tuple[Tensor, Run, Activations, Activations, Tensor]


def patch(
    model: LoadedModel,
    task: Task,
    nodes: Iterable[AnyHead] | Sublayers | None = None,
    *,
    receivers: Iterable[AnyHead] | None = None,
    freeze_mlps: bool = False,
    direction: Direction = "noising",
    positions: str | None = None,
    noise: float | None = None,
    noise_at: str | None = None,
    window: int = 1,
    seed: Seed = 0,
    progress: bool = True,
) -> PatchEffects:
    """Replace what one head or MLP writes by what it writes for the paired prompt, each alone.

        effect = (metric patched - metric of the run) / (metric of the other run - metric of the run)

    With `receivers` (path patching) the node is replaced for these alone, all other heads held as they
    are: what a sender tells receivers directly. MLPs are computed anew (`freeze_mlps` holds them too);
    what the receivers then read is put into the run, in which everything behind them is free. Receivers
    do not see each other change.

    Args:
        model: as `lens.load` returns it.
        task: with corrupt prompts.
        nodes: such as "L9H6" ("a9.h6" of a circuit), "m0" and "input"; all heads and MLPs if not given. Or a
            word for every layer in turn: "residual" (the stream that enters it), "attention" (all its heads) or "mlp".
        receivers: "logits", MLPs, heads ("L9H9" reads by all three) or parts of them ("a9.h9<q>"); None:
            everything that reads the node.
        freeze_mlps: with receivers: whether paths through MLPs do not count as direct.
        direction: "noising" or "denoising".
        positions: None patches all tokens at once; a mark of the task (such as "s2") the token
            there; "each" every token by itself (not with receivers).
        noise: the other run is the clean prompt with Gaussian noise of so many standard deviations of the
            embeddings of all prompts of the task on its own, instead of the corrupt prompt (causal tracing, 3 there).
        noise_at: mark of the task where the noise is, such as the subject; None: on every token.
        window: with "attention" or "mlp": so many layers together, the named one in their middle.
        seed: of the noise, and of the bootstrap.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown direction, node, receiver or mark, no corrupt prompts, or a model whose parts
            are not known.

    Reference: Zhang, Nanda 2023, arXiv 2309.16042; Heimersheim, Nanda 2024, arXiv 2404.15255. Path
        patching: Wang et al. 2022, arXiv 2211.00593 (not the general one of Goldowsky-Dill et al., which
        treats every path as its own).

    Causal tracing: Meng et al. 2022, arXiv 2202.05262; noise against counterfactuals: arXiv 2309.16042.

    Example:
        >>> lens.circuits.patch(small, copying, ["a0.h1"], receivers=["logits"], progress=False).table()
        >>> lens.circuits.patch(small, copying, "residual", positions="each", direction="denoising").plot()
    """
    if isinstance(nodes, str) and nodes in get_args(Sublayers):
        if receivers is not None or freeze_mlps:
            raise LensError("receivers and freeze_mlps are for nodes that are named one by one")
        return patch_streams(
            model,
            task,
            cast(Sublayers, nodes),
            direction,
            positions,
            noise,
            noise_at,
            window,
            seed,
            progress,
        )
    if window != 1:
        raise LensError("window goes with nodes='attention' or 'mlp'")
    check_noise(task, noise, noise_at)
    if receivers is None and freeze_mlps:
        raise LensError("freeze_mlps is for patching with receivers; give receivers")
    found, graph, names = _begin(model, task, nodes, direction, noise)
    runs = _runs(found, task, direction, (noise, noise_at, seed))
    if receivers is not None:
        return _patch_paths(
            found, task, receivers, names, freeze_mlps, direction, positions, runs, seed, progress
        )
    places = places_of(task, positions)
    masks = torch.zeros(len(names), *graph.allowed.shape)
    for number, name in enumerate(names):
        masks[number, :, graph.writers.index(name)] = 1
    values, ends = [], []
    with torch.no_grad(), advancing(f"{model.name}: patching", task.n, progress) as advance:
        for rows, run, own, source, whole in runs:
            read = []
            for _, where in places:
                reference = _mixed(own, source, where[rows])
                parts = masks.split(max(1, _COPIES // len(rows)))
                logits = (
                    one
                    for some in parts
                    for one in masked_logits(found, run.ids, reference, some, noise=run.noise)
                )
                read.append(torch.stack([measured(task, one, rows) for one in logits]))
            values.append(torch.stack(read, 1).numpy())
            ends.append(whole)
            advance(len(rows))
    return effects_of(model, task, names, places, values, ends, direction, (), seed)


def _patch_paths(
    found: Nodes,
    task: Task,
    receivers: Iterable[AnyHead],
    names: tuple[str, ...],
    freeze_mlps: bool,
    direction: Direction,
    positions: str | None,
    runs: Iterable[_Pair],
    seed: int,
    progress: bool,
) -> PatchEffects:
    """`patch` with receivers."""
    if positions == EACH:
        raise LensError(
            "with receivers patch takes one place at a time: None, or a mark of the task"
        )
    graph, model = found.graph, found.model
    into = _receivers(graph, receivers)
    places = places_of(task, positions)
    mask = torch.zeros(1, *graph.allowed.shape)
    mask[0, [graph.readers.index(name) for name in into]] = 1
    values, ends = [], []
    with torch.no_grad(), advancing(f"{model.name}: path patching", task.n, progress) as advance:
        for rows, run, own, source, whole in runs:
            where, read = places[0][1][rows], []
            size = max(1, _COPIES // len(rows))
            for start in range(0, len(names), size):
                some = names[start : start + size]
                ids, noise = (_copied(part, len(some)) for part in (run.ids, run.noise))
                reference = _stacked([_replaced(graph, own, source, one, where) for one in some])
                if not freeze_mlps:
                    reference = _with_mlps(found, ids, reference, some)
                logits = masked_logits(found, ids, reference, mask, noise=noise)[0]
                read += [measured(task, one, rows) for one in logits.unflatten(0, (len(some), -1))]
            values.append(torch.stack(read)[:, None].numpy())
            ends.append(whole)
            advance(len(rows))
    return effects_of(model, task, names, places, values, ends, direction, into, seed)


class _Frozen(PlainVisitor):
    """Heads write what is given; MLPs are computed, but for the one of each row that is held, or none (-1)."""

    def __init__(self, nodes: Nodes, given: Activations, held: Tensor) -> None:
        super().__init__(nodes)
        self._given, self._held = given, held
        self.mlps: list[Tensor] = []

    def enter(self, hidden: Tensor) -> Tensor:
        return self._given.input

    def heads(self, layer: int, z: Tensor) -> Tensor:
        return self._given.heads[layer]

    def mlp(self, layer: int, output: Tensor) -> Tensor:
        held = (self._held == layer)[:, None, None]
        self.mlps.append(self._given.mlps[layer].where(held, output))
        return self.mlps[-1]


def _copied(part: Tensor | None, copies: int) -> Any:
    """Its rows so many times, one copy after the other."""
    return None if part is None else part.repeat(copies, *[1] * (part.dim() - 1))


def _stacked(several: Sequence[Activations]) -> Activations:
    """The rows of each, one after the other."""
    heads, mlps = (
        [torch.cat(parts) for parts in zip(*layers, strict=True)]
        for layers in ([one.heads for one in several], [one.mlps for one in several])
    )
    return Activations(torch.cat([one.input for one in several]), heads, mlps)


def _with_mlps(
    nodes: Nodes, ids: Tensor, given: Activations, senders: Sequence[str]
) -> Activations:
    """The same with what the MLPs write when they read it; `given` has the rows of each sender in turn."""
    held = torch.tensor([int(one[1:]) if one.startswith("m") else -1 for one in senders])
    held = held.to(given.input.device).repeat_interleave(len(ids) // len(senders))
    frozen = _Frozen(nodes, given, held)
    visit(nodes, ids, frozen)
    return Activations(given.input, given.heads, frozen.mlps)


def _begin(
    model: LoadedModel,
    task: Task,
    nodes: Iterable[AnyHead] | None,
    direction: Direction,
    noise: float | None,
) -> tuple[Nodes, Graph, tuple[str, ...]]:
    if noise is None:
        task.corrupt_or_refuse()
    task.check(model)
    found = find_nodes(model)
    named = () if nodes is None else one_or_more("nodes", nodes)
    names = tuple(dict.fromkeys(map(node_of_head, named)))
    names = found.graph.writers[1:] if nodes is None else names
    known = set(found.graph.writers)
    if not names or (unknown := [name for name in names if name not in known]):
        raise LensError(
            f"nodes must be writers of the graph, such as {found.graph.writers[1]!r} or 'input', or one of "
            f"{', '.join(map(repr, get_args(Sublayers)))}; got {unknown[0] if names else 'none'!r}"
        )
    return found, found.graph, names


def _receivers(graph: Graph, names: Iterable[AnyHead]) -> tuple[str, ...]:
    found: list[str] = []
    for given in one_or_more("receivers", names):
        head, part, rest = given.partition("<") if isinstance(given, str) else (given, "", "")
        named = node_of_head(head)
        name = f"{named}{part}{rest}" if part else named
        parts = [reader for reader in graph.readers if reader.partition("<")[0] == name]
        parts = parts or [reader for reader in graph.readers if reader == name]
        if not parts:
            raise LensError(
                f"there is no receiver {name!r}; give 'logits', an MLP, a head such as "
                f"{graph.writers[1]!r}, or a part of it such as {graph.readers[0]!r}"
            )
        found += parts
    if not found:
        raise LensError("patch needs at least one receiver, such as 'logits'")
    return tuple(dict.fromkeys(found))


def _runs(
    nodes: Nodes, task: Task, direction: Direction, noise: tuple[float | None, str | None, int]
) -> Iterator[_Pair]:
    """Rows, the run that is patched, what it makes and what the other makes, and the metric [2, rows] of both."""
    for rows, clean, other in pairs(nodes, task, *noise):
        into, out_of = (clean, other) if direction == "noising" else (other, clean)
        (base, own), (whole, source) = (
            read_activations(nodes, run.ids, run.noise) for run in (into, out_of)
        )
        both = torch.stack([measured(task, one, rows) for one in (base, whole)])
        yield rows, into, own, source, both


def _mixed(own: Activations, source: Activations, where: Tensor) -> Activations:
    """`source` at [rows, tokens], `own` elsewhere."""
    flat, by_head = where[:, :, None], where[:, None, :, None]
    return Activations(
        source.input.where(flat, own.input),
        [s.where(by_head, o) for s, o in zip(source.heads, own.heads, strict=True)],
        [s.where(flat, o) for s, o in zip(source.mlps, own.mlps, strict=True)],
    )


def _replaced(
    graph: Graph, own: Activations, source: Activations, name: str, where: Tensor
) -> Activations:
    """`own`, with one writer as in `source` at [rows, tokens]."""
    mixed = _mixed(own, source, where)
    heads, mlps = list(own.heads), list(own.mlps)
    if name == "input":
        return Activations(mixed.input, heads, mlps)
    layer, _, head = name[1:].partition(".h")
    if head:
        heads[int(layer)] = heads[int(layer)].clone()
        heads[int(layer)][:, int(head)] = mixed.heads[int(layer)][:, int(head)]
    else:
        mlps[int(layer)] = mixed.mlps[int(layer)]
    return Activations(own.input, heads, mlps)
