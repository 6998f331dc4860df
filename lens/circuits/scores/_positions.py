"""`positions`: what every edge is worth at every place of the prompts, and from which place to which heads carry it.

Two kinds of edges (PEAP). Within a place: what a reader reads there of a writer. Across places, in a head, from a key's
span t to a query's span s: the head's output in the rows of s when its values, keys or queries are those of the corrupt
prompt at t alone (queries: in the logits of the keys of t alone),

    v   o'_i - o_i = sum over t of A_ij (v'_j - v_j)
    k   the same row with the keys of t replaced        q   with (q'_i - q_i) k_j added to the logits of t

"exact" runs the model with each one alone; "eap" and "eap-ig" take the gradient by what is read, and by the head's
output, times these differences. Inside of the attention nothing is approximate: the softmax is taken again, by
kernel calls, and no N×N matrix is built. Of spans of one token these are the paper's closed forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lens.circuits.graph.activations import (
    Ablation,
    Activations,
    PlainVisitor,
)
from lens.circuits.graph.graph import Kv
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import Nodes, find_nodes, visit
from lens.circuits.graph.spans import Given, find_spans
from lens.circuits.graph.ways import PARTS, read_both, replaced
from lens.circuits.scores.attribution import Stage, edge_products, head_slopes
from lens.circuits.scores.batch import Batch
from lens.circuits.scores.methods import EapIg, named
from lens.circuits.scores.position_scores import PositionScores
from lens.common.choices import check_choice, check_counts
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.tasks.task import Task

Method = Literal["exact", "eap", "eap-ig"]
_ROWS, _COPIES = 8, 64


def positions(
    model: LoadedModel,
    task: Task,
    spans: Given | None = None,
    *,
    method: Method | EapIg = "eap-ig",
    kv: Kv = "head",
    progress: bool = True,
) -> PositionScores:
    """Score every edge at every place, and every head's way from place to place; positive = the task needs it.

    Args:
        model: as `lens.load` returns it.
        task: with corrupt prompts.
        spans: the places: name -> position, or (first, past the last), for all prompts or for each; None: the marks of
            the task's template; "each": every token. Tokens in none of them are "rest".
        method: "exact" (a run of the model for each), "eap", or "eap-ig" (gradients on the way from corrupt to clean
            inputs; `lens.circuits.EapIg` for steps of your own).
        kv: "head" gives query heads of a group keys and values of their own in the edges, "group" does not.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: as `lens.circuits.score_edges`, spans that share a token or are not in the prompts, or a task without marks
            where none are given.

    Reference: Haklay et al., Position-aware Automatic Circuit Discovery, 2025, arXiv 2502.04577.

    Example:
        >>> known = lens.circuits.known.induction_transformer(beta=4)
        >>> lens.circuits.scores.positions(known.model, known.task, "each").table(1)["edge"].item()
        'input->a1.h0<q>'
    """
    word, integrated = named(method)
    check_choice("method", word, Method)
    steps = 1 if integrated is None else integrated.steps
    check_counts(steps=steps)
    rule = "midpoint" if integrated is None else integrated.rule
    if task.is_flat and word == "eap":
        raise LensError(
            f"the metric {task.metric!r} is flat at the clean prompts; use method='eap-ig'"
        )
    corrupt = task.corrupt_or_refuse()
    places = find_spans(task, spans)
    nodes = find_nodes(model, kv=kv)
    task.check(nodes.model)
    ablation = Ablation(kv=kv, positions=", ".join(places.names))
    within, across = [], []
    with advancing(f"{model.name}: {word} at places", task.n, progress) as advance:
        for rows in task.chunks(min(_ROWS, task.rows_at_once(nodes.model))):

            def measure(logits: Tensor, rows: Tensor = rows) -> Tensor:
                return task.sign * task.measure(logits, rows)

            ids, where = task.clean[rows], places.where[:, rows].to(nodes.model.device)
            (own, clean), (reference, other) = (
                read_both(nodes, one) for one in (ids, corrupt[rows])
            )
            calls = clean, other
            batch = Batch(nodes, ids, measure, reference, own.minus(reference), int(steps), rule)
            if word == "exact":
                within.append(_exact_within(batch, own, where))
                across.append(_exact_across(batch, calls, where))
            else:
                replaced = _inputs(batch, word)
                within.append(_within(batch, replaced, where))
                across.append(_across(batch, replaced, calls, where))
            advance(len(rows))
    return PositionScores(
        graph=nodes.graph,
        spans=places.names,
        where=places.where.numpy(),
        within=np.concatenate(within),
        across=np.concatenate(across),
        method=word,
        ablation=ablation,
        metric=task.metric,
        task=task.name,
        model=model.name,
        **({} if integrated is None else {"steps": int(steps), "rule": rule}),
    )


def _inputs(batch: Batch, method: str) -> list[dict[Stage, Tensor]]:
    """What enters the first layer where gradients are taken."""
    if method == "eap":
        return [{}]
    since, change = batch.reference.input, batch.differences.input
    return [{("input", 0): since + fraction * change} for fraction in batch.fractions]


def _within(batch: Batch, replaced: list[dict[Stage, Tensor]], where: Tensor) -> np.ndarray:
    """[rows, spans, edges]: gradients times the differences of one span alone."""
    products = [
        edge_products(
            batch.nodes, batch.ids, batch.measure, batch.differences, one,
            refuse_flat=not one, where=where,
        )
        for one in replaced
    ]  # fmt: skip
    return np.mean(products, axis=0)


def _at(differences: Activations, span: Tensor) -> Activations:
    """Those at [rows, tokens] alone, 0 elsewhere."""
    return differences.each(
        lambda part: part * span[(slice(None), *[None] * (part.dim() - 3))][..., None]
    )


def _changes(clean: LayerCall, corrupt: LayerCall, where: Tensor) -> Iterator[Tensor]:
    """Of each span [parts, rows, heads, tokens, head_dim]: what `PARTS` of its keys alone change of the heads' outputs."""
    plain = attend(clean, statistics=()).output
    for at in where[:, :, None]:
        chosen = torch.eye(len(PARTS), dtype=torch.bool, device=at.device)[..., None, None, None]
        patched = [replaced(clean, corrupt, *(at & one)) for one in chosen]
        yield torch.stack([attend(one, statistics=()).output - plain for one in patched])


def _across(
    batch: Batch,
    replaced: list[dict[Stage, Tensor]],
    calls: tuple[list[LayerCall], list[LayerCall]],
    where: Tensor,
) -> np.ndarray:
    """[rows, parts, layers, heads, query spans, key spans]."""
    slopes = [head_slopes(batch.nodes, batch.ids, batch.measure, one).heads for one in replaced]
    found = []
    with torch.no_grad():
        for layer, pair in enumerate(zip(*calls, strict=True)):
            slope = torch.stack([one[layer] for one in slopes]).mean(0)
            by_key = []
            for change in _changes(*pair, where):
                rows = (change * slope).sum(-1)  # [parts, rows, heads, tokens]
                by_key.append(torch.einsum("prht,srt->rphs", rows, where.to(rows)))
            found.append(torch.stack(by_key, -1))
    return -torch.stack(found, 2).double().cpu().numpy()


def _exact_within(batch: Batch, own: Activations, where: Tensor) -> np.ndarray:
    """[rows, spans, edges]: the model run with each edge replaced in one span alone."""
    graph = batch.nodes.graph
    masks = torch.as_tensor(graph.dense(np.eye(graph.n, dtype=np.float32)))
    found = []
    with torch.no_grad():
        plain = _measured(batch, batch.ids, PlainVisitor(batch.nodes), 1)[0]
        for span in where:
            reference = own.minus(_at(batch.differences, span))
            values = [
                batch.measure(logits).double()
                for some in masks.split(max(1, _COPIES // len(batch.ids)))
                for logits in masked_logits(batch.nodes, batch.ids, reference, some)
            ]
            found.append((plain - torch.stack(values)).T.cpu().numpy())
    return np.stack(found, 1)


def _measured(batch: Batch, ids: Tensor, visitor: PlainVisitor, copies: int) -> Tensor:
    """[copies, rows] of the metric."""
    logits = visit(batch.nodes, ids, visitor).unflatten(0, (copies, -1))
    return torch.stack([batch.measure(one).double() for one in logits])


class _Adding(PlainVisitor):
    """Adds to what single heads of one layer give, one copy of the rows each."""

    def __init__(self, nodes: Nodes, layer: int, heads: list[int], added: Tensor) -> None:
        super().__init__(nodes)
        self._layer, self._heads = layer, heads
        self._added = added  # [copies, rows, tokens, head_dim]

    def heads(self, layer: int, z: Tensor) -> Tensor:
        if layer != self._layer:
            return z
        copies = z.unflatten(0, (len(self._heads), -1)).clone()
        for copy, head, added in zip(copies, self._heads, self._added, strict=True):
            copy[:, head] += added
        return copies.flatten(0, 1)


def _exact_across(
    batch: Batch, calls: tuple[list[LayerCall], list[LayerCall]], where: Tensor
) -> np.ndarray:
    """[rows, parts, layers, heads, query spans, key spans]: the model run with each way replaced."""
    graph, spans = batch.nodes.graph, len(where)
    found = np.zeros((len(batch.ids), len(PARTS), graph.layers, graph.heads, spans, spans))
    with torch.no_grad():
        plain = _measured(batch, batch.ids, PlainVisitor(batch.nodes), 1)
        for layer, pair in enumerate(zip(*calls, strict=True)):
            changes = torch.stack(list(_changes(*pair, where)))
            for some in _some(len(PARTS), graph.heads, spans, max(1, _COPIES // len(batch.ids))):
                added = torch.stack(
                    [changes[t, part, :, head] * where[s][..., None] for part, head, s, t in some]
                )
                adding = _Adding(batch.nodes, layer, [one[1] for one in some], added)
                values = _measured(batch, batch.ids.repeat(len(some), 1), adding, len(some))
                for (part, head, s, t), lost in zip(some, plain - values, strict=True):
                    found[:, part, layer, head, s, t] = lost.cpu().numpy()
    return found


def _some(
    parts: int, heads: int, spans: int, most: int
) -> Iterator[list[tuple[int, int, int, int]]]:
    """(part, head, query span, key span) of all, `most` at once."""
    every = list(np.ndindex(parts, heads, spans, spans))
    for start in range(0, len(every), most):
        yield [tuple(map(int, one)) for one in every[start : start + most]]  # pyright: ignore[reportReturnType]
