"""Scores of the edges of hybrids (`lens.circuits.graph.mixed`): each edge alone, and by gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lens.circuits.graph.activations import Ablation, Activations
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.mixed import Mixed, Written
from lens.circuits.graph.references import References
from lens.circuits.scores.batch import fractions_of
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.tasks.task import Task

METHODS = ("exact", "eap", "eap-ig")


def score_mixed(
    mixed: Mixed,
    task: Task,
    method: str,
    ablation: Ablation,
    steps: int | Literal["auto"],
    rule: str,
    rows_at_once: int,
    progress: bool,
) -> EdgeScores:
    """`lens.circuits.score_edges` of a model some of whose layers have mixers.

    Raises:
        LensError: another method, steps "auto", or no corrupt prompts where they are asked for; as `Mixed`.
    """
    if method not in METHODS or steps == "auto":
        asked = f"{method!r} with steps='auto'" if steps == "auto" else repr(method)
        raise LensError(
            f"edges of models with mixers are scored by {', '.join(METHODS)} with a number of steps; got {asked}"
        )
    model = mixed.model
    references = References(mixed, task, ablation)
    fractions = [1.0] if method == "eap" else fractions_of(steps, rule)
    found = []
    with advancing(f"{model.name}: {method}", task.n, progress) as advance:
        for rows in task.chunks(rows_at_once):
            ids = task.clean[rows].to(model.device)

            def measure(logits: Tensor, rows: Tensor = rows) -> Tensor:
                return task.sign * task.measure(logits, rows)

            with torch.no_grad():
                clean, reference = mixed.run(ids), references.of(rows)
            if method == "exact":
                copies = max(1, rows_at_once // len(rows))
                scores = _exact(mixed, ids, measure, clean, reference, copies)
            else:
                scores = _attributed(mixed, ids, measure, clean, reference, fractions)
            found.append(scores.double().cpu().numpy())
            advance(len(rows))
    integrated = (steps, rule) if method == "eap-ig" else (None, None)
    graph: Any = mixed.graph  # has what scores and selections ask for; the rest it refuses itself
    return EdgeScores(
        graph, np.concatenate(found), method, ablation, task.metric, task.name, model.name,
        *integrated,
    )  # fmt: skip


def _exact(
    mixed: Mixed,
    ids: Tensor,
    measure: Callable[[Tensor], Tensor],
    clean: Written,
    reference: Activations,
    copies: int,
) -> Tensor:
    """[rows, edges]: what the metric loses with each edge alone replaced, so many edges in one pass."""
    graph = mixed.graph
    masks = torch.as_tensor(graph.dense(np.eye(graph.n, dtype=np.float32)))
    with torch.no_grad():
        values = [
            measure(logits)
            for some in masks.split(copies)
            for logits in mixed.masked(ids, reference, some)
        ]
        return torch.stack([measure(clean.logits) - one for one in values], 1)


def _attributed(
    mixed: Mixed,
    ids: Tensor,
    measure: Callable[[Tensor], Tensor],
    clean: Written,
    reference: Activations,
    fractions: list[float],
) -> Tensor:
    """[rows, edges]: differences of writers times mean gradients at readers, over inputs between reference and clean."""
    change = clean.minus(reference)
    written = [mixed.written(number, heads) for number, heads in enumerate(change.heads)]
    total = torch.zeros(len(ids), len(mixed.graph.readers), len(mixed.graph.writers))
    total = total.to(change.input)
    for fraction in fractions:
        read: list[Tensor] = []

        def reads(_: int, hidden: Tensor, read: list[Tensor] = read) -> Tensor:
            read.append(hidden.view_as(hidden))  # its own name, so that its gradient comes alone
            return read[-1]

        entered = (reference.input + fraction * change.input).expand_as(clean.input)
        with torch.enable_grad():
            own = mixed.run(ids, reads, entered.detach().requires_grad_())
            values = measure(own.logits)
            if not values.requires_grad:
                raise LensError("the metric has no gradient; use 'logit_difference' or 'loss'")
            slopes = torch.autograd.grad(values.sum(), read, materialize_grads=True)
        for number, (slope, before) in enumerate(zip(slopes, mixed.graph.before, strict=True)):
            count, found = 1, [torch.einsum("rtd,rtd->r", change.input, slope)[:, None]]
            for part, (heads, output) in enumerate(zip(own.heads, written, strict=True)):
                if count >= before:  # what is written after the reader
                    break
                back = mixed.slope(part, heads, slope)
                found.append(torch.einsum("rwtd,rtd->rw", output, back))
                count += output.shape[1]
            total[:, number, :count] += torch.cat(found, 1) / len(fractions)
    return total[:, torch.as_tensor(mixed.graph.allowed, device=total.device)]
