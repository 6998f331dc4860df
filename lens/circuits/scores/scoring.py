"""`score_edges`: every way to score the edges of a model on a task, behind one call.

Each method is a function from the nodes, a batch of prompts and their references to [rows, edges].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lens.circuits.discovery._hard_concrete import learn_masks
from lens.circuits.graph.activations import Ablation, Activations, Baseline, read_activations
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Kv
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.mixed import mixed_of
from lens.circuits.graph.nodes import Nodes, find_nodes
from lens.circuits.graph.references import References
from lens.circuits.scores.atp import atp_star, atp_star_grad_drop, atp_star_together
from lens.circuits.scores.attribution import Stage, edge_products, for_numpy
from lens.circuits.scores.batch import Batch, fractions_of
from lens.circuits.scores.methods import EapIg, Hybrid, Method, named
from lens.circuits.scores.mixed import score_mixed
from lens.circuits.scores.relp import relevance, relevance_of_values
from lens.common.choices import Count
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.tasks.task import Task

_ROWS = 8
_FIRST, _MOST, _ENOUGH = 5, 640, 0.01  # steps of "auto", and the share of the effect it may miss
_COPIES = 64  # rows of one masked forward pass
_AT_CLEAN = ("eap", "atp*", "atp*-together", "atp*-grad-drop", "relp", "relp-values")


def score_edges(
    model: LoadedModel,
    task: Task,
    *,
    method: Method | EapIg | Hybrid = "eap-ig",
    baseline: Baseline = "counterfactual",
    kv: Kv = "head",
    batch_size: Count = _ROWS,
    progress: bool = True,
) -> EdgeScores:
    """Score every edge of a model on a task; positive = ablating the edge makes the task worse.

        exact               metric clean - metric with the edge ablated (one forward pass per edge)
        eap                 (out - ref) · gradient at the reader, at the clean prompts
        clean-corrupted     the same with the mean of the gradients at the clean prompts and with the reference as input
        eap-ig              the same with the mean gradient over inputs between them
        eap-ig-activations  the same with each stage's outputs in turn (input, heads of a layer, its MLP)
                            between theirs, summed and divided by the number of stages and steps;
                            with rule="left" what EAP-IG's own code gives: there readers of the input
                            alone get no share of its stage where no positions are added to it
        eap-ig-stages       our own form of it: of a stage only the gradients of readers that come after
        atp*                eap with the softmax recomputed for edges into queries and keys, each key
                            position alone (`lens.circuits.scores.atp`)
        atp*-together       the same, all key positions patched at once, as "exact" does
        atp*-grad-drop      mean size of atp* over gradients blocked in one layer after another
        relp                eap with the backward rules of relevance for norms, activations and gates
                            (`lens.circuits.scores.relp`)
        relp-values         the same with constant attention patterns
        hybrid              mean of eap-ig, eap and eap-ig-activations at equal scale (`lens.circuits.scores.Hybrid`)

    In hybrids heads of mixers (Mamba-2, delta rules, ...) are nodes as softmax heads are, `a0.h1`; the heads of a layer
    read as one, `a0`. There "exact", "eap" and "eap-ig" are known.

    Args:
        model: as `lens.load` returns it.
        task: its metric is differentiated ("exact" needs no gradient); with corrupt prompts for the baseline
            "counterfactual".
        method: one of the above; `lens.circuits.EapIg` is "eap-ig" and its kin with steps of your own.
        baseline: what replaces a writer: "counterfactual" (the corrupt prompt), "mean" or "zero".
        kv: "head" gives query heads of a group keys and values of their own, "group" does not.
        batch_size: prompts in one pass; changes memory and no score.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Raises:
        LensError: an unknown method or baseline, a model whose edges cannot be replaced exactly, a task without what the method needs, a metric that is flat at the clean
            prompts for a method with gradients there alone, or integration that is not done after 640 steps.

    Reference: Syed et al. 2023, arXiv 2310.10348 (eap); Hanna et al. 2024, arXiv 2403.17806 (eap-ig);
        Kramár et al. 2024, arXiv 2403.00745 (atp*); Rezaei Jafari et al. 2025, arXiv 2508.21258 (relp).

    Example:
        >>> known = lens.circuits.known.induction_transformer(beta=4)
        >>> score_edges(known.model, known.task, method="exact").top(2).edges
        ('input->a1.h0<q>', 'a1.h0->logits')
    """
    if isinstance(method, Hybrid) or method == "hybrid":
        several = method if isinstance(method, Hybrid) else Hybrid()
        asked = {"baseline": baseline, "kv": kv, "batch_size": batch_size, "progress": progress}
        found = [score_edges(model, task, method=one, **asked) for one in several.methods]
        if several.pruning is not None:
            found.append(_kept_by_pruning(model, task, found[0], several, asked))
        return _together(found)
    word, integrated = named(method)
    steps: int | Literal["auto"] = 1 if integrated is None else integrated.steps
    rule = "midpoint" if integrated is None else integrated.rule
    at_clean = word in _AT_CLEAN or (
        word == "eap-ig-activations" and fractions_of(int(steps), rule, 1.0) == [1.0]
    )
    if task.is_flat and at_clean:
        raise LensError(
            f"the metric {task.metric!r} is flat at the clean prompts, where it is at its best, and "
            f"method={word!r} takes its gradient there{' alone' * (word not in _AT_CLEAN)}, so that its scores "
            "are rounding; use method='eap-ig', whose gradients are taken on the way to the corrupt prompts"
        )
    chosen = Ablation(baseline, kv=kv)
    rows = min(batch_size, task.rows_at_once(model))
    if (mixed := mixed_of(model)) is not None:
        return score_mixed(mixed, task, word, chosen, steps, rule, rows, progress)
    nodes = find_nodes(model, kv=kv)
    references = References(nodes, task, chosen)

    def scored(count: int) -> tuple[EdgeScores, float]:
        return _score(nodes, task, references, chosen, word, count, rule, rows, progress)

    if steps != "auto":
        return scored(steps)[0]
    count, missing = _FIRST, np.inf
    while count <= _MOST:
        found, missing = scored(count)
        if missing < _ENOUGH:
            return found
        count *= 2
    raise LensError(
        f"after {count // 2} steps {missing:.1%} of the effect is still missing, so the gradients say "
        "little; look at method='atp*' or 'exact', or give a number of steps"
    )


def _kept_by_pruning(
    model: LoadedModel, task: Task, first: EdgeScores, hybrid: Hybrid, asked: dict[str, Any]
) -> EdgeScores:
    """Probability that edge pruning keeps each edge, with the sign of `first`, for every prompt alike."""
    learned = learn_masks(
        model,
        task,
        sparsity=hybrid.pruning,
        steps=hybrid.steps,
        start=np.abs(first.values),
        **asked,
    )
    signed = np.sign(first.values) * learned.probabilities
    return replace(first, per_prompt=np.broadcast_to(signed, first.per_prompt.shape))


def _together(found: Sequence[EdgeScores]) -> EdgeScores:
    """Their mean at equal root mean square, in the scale of the first."""
    sizes = [float(np.sqrt(np.square(one.values).mean())) for one in found]
    parts = [
        one.per_prompt * (sizes[0] / size if size else 0.0)
        for one, size in zip(found, sizes, strict=True)
    ]
    return replace(
        found[0], per_prompt=np.mean(parts, 0), method="hybrid", steps=None, rule=None, residual=None,
        total=None,
    )  # fmt: skip


def _score(
    nodes: Nodes,
    task: Task,
    references: References,
    ablation: Ablation,
    method: Method,
    steps: int,
    rule: str,
    rows_at_once: int,
    progress: bool,
) -> tuple[EdgeScores, float]:
    """Scores, and what integration misses of the whole effect: mean size over mean size."""
    model = nodes.model
    found, gaps, totals = [], [], []
    with advancing(f"{model.name}: {method}", task.n, progress) as advance:
        for rows in task.chunks(rows_at_once):

            def measure(logits: Tensor, rows: Tensor = rows) -> Tensor:
                return task.sign * task.measure(logits, rows)

            ids = task.clean[rows]
            reference = references.of(rows)
            clean, differences = _differences(nodes, ids, measure, reference)
            batch = Batch(nodes, ids, measure, reference, differences, steps, rule)
            scores = METHODS[method](batch)
            found.append(scores)
            if method == "eap-ig":
                total = (clean - measure(_reference_logits(batch))).cpu().numpy()
                totals.append(total)
                gaps.append(scores[:, nodes.graph.ends[1] == 0].sum(1) - total)
            advance(len(rows))
    integrated = (steps, rule) if method.startswith("eap-ig") else (None, None)
    gap, total = (np.concatenate(part) if part else np.zeros(1) for part in (gaps, totals))
    missing = (float(gap.mean()), float(total.mean())) if gaps else (None, None)
    result = EdgeScores(
        nodes.graph, np.concatenate(found), method, ablation, task.metric, task.name, model.name,
        *integrated, *missing,
    )  # fmt: skip
    size = np.abs(total).mean()
    return result, float(np.abs(gap).mean() / size) if size else float("inf" if gap.any() else 0)


def _differences(
    nodes: Nodes, ids: Tensor, measure: Callable[[Tensor], Tensor], reference: Activations
) -> tuple[Tensor, Activations]:
    """The metric of a clean run, and clean - reference; the clean outputs and logits are let go."""
    logits, clean = read_activations(nodes, ids)
    return measure(logits), clean.minus(reference)


def exact(batch: Batch) -> np.ndarray:
    """Each edge ablated alone, by masked forward passes: [rows, edges]."""
    graph = batch.nodes.graph
    reader, writer = graph.ends
    found, at_once = [], max(1, _COPIES // len(batch.ids))
    with torch.no_grad():
        for start in range(-1, graph.n, at_once):  # -1: no edge, the clean run
            edges = np.arange(start, min(start + at_once, graph.n))
            masks = torch.zeros(len(edges), *graph.allowed.shape)
            for number, edge in enumerate(edges):
                if edge >= 0:
                    masks[number, reader[edge], writer[edge]] = 1
            logits = masked_logits(batch.nodes, batch.ids, batch.reference, masks)
            found += [batch.measure(part).cpu().numpy() for part in logits]
    return (found[0] - np.stack(found[1:])).T


def eap(batch: Batch) -> np.ndarray:
    """Gradient at the clean prompts: [rows, edges]."""
    return edge_products(batch.nodes, batch.ids, batch.measure, batch.differences, refuse_flat=True)


def clean_corrupted(batch: Batch) -> np.ndarray:
    """Mean of the gradients at the clean prompts and with the reference as input: [rows, edges]."""
    return _mean_over_inputs(batch, [0.0, 1.0])


def eap_ig(batch: Batch) -> np.ndarray:
    """Mean gradient over inputs between reference and clean: [rows, edges]."""
    return _mean_over_inputs(batch, batch.fractions)


def eap_ig_activations(batch: Batch) -> np.ndarray:
    """Mean over stages and steps of the gradients at all readers: [rows, edges].

    Of published code (hannamw/EAP-IG) this keeps that no gradient is seen where all that is read is a
    constant: behind an interpolated embedding that nothing is added to.
    """
    graph = batch.nodes.graph
    every = np.ones(graph.n, bool)
    others = graph.allowed.sum(1)[graph.ends[0]] > 1  # edges whose reader reads more than the input
    of_input = every if batch.nodes.layout.adds_positions else others

    def seen(stage: Stage, _: int) -> np.ndarray:
        return of_input if stage[0] == "input" else every

    return _over_stages(batch, batch.later_fractions, seen)


def eap_ig_stages(batch: Batch) -> np.ndarray:
    """Mean over stages and steps of the gradients after the stage that is interpolated: [rows, edges]."""
    graph = batch.nodes.graph
    return _over_stages(
        batch, batch.fractions, lambda _, writer: graph.allowed[graph.ends[0], writer]
    )


def _over_stages(
    batch: Batch, fractions: list[float], seen: Callable[[Stage, int], np.ndarray]
) -> np.ndarray:
    """[rows, edges]: mean over stages and fractions; `seen` (stage, its first writer): which edges count."""
    graph, differences, reference = batch.nodes.graph, batch.differences, batch.reference
    stages: list[tuple[Stage, int, Tensor, Tensor]] = [
        (("input", 0), 0, reference.input, differences.input)
    ]
    for layer in range(graph.layers):
        first = graph.heads_of(layer).start
        pair = reference.heads[layer], differences.heads[layer]
        stages.append((("heads", layer), first, *pair))
        if graph.mlps:
            pair = reference.mlps[layer], differences.mlps[layer]
            stages.append((("mlp", layer), graph.mlp_writer(layer), *pair))
    found = np.zeros((len(batch.ids), graph.n), for_numpy(differences.input).dtype)
    for stage, writer, since, change in stages:
        counted = seen(stage, writer)
        for fraction in fractions:
            between = {stage: since + fraction * change}
            found += counted * edge_products(
                batch.nodes, batch.ids, batch.measure, differences, between
            )
    return found / (len(stages) * batch.steps)


METHODS: dict[Method, Callable[[Batch], np.ndarray]] = {
    "exact": exact,
    "eap": eap,
    "clean-corrupted": clean_corrupted,
    "eap-ig": eap_ig,
    "eap-ig-activations": eap_ig_activations,
    "eap-ig-stages": eap_ig_stages,
    "atp*": atp_star,
    "atp*-together": atp_star_together,
    "atp*-grad-drop": atp_star_grad_drop,
    "relp": relevance,
    "relp-values": relevance_of_values,
}


def _mean_over_inputs(batch: Batch, fractions: list[float]) -> np.ndarray:
    total: np.ndarray | float = 0.0
    for fraction in fractions:
        inputs = batch.reference.input + fraction * batch.differences.input
        total = total + edge_products(
            batch.nodes, batch.ids, batch.measure, batch.differences, {("input", 0): inputs}
        )
    return np.asarray(total / len(fractions))


def _reference_logits(batch: Batch) -> Tensor:
    """Logits when only the input is replaced by its reference: where the integration begins."""
    graph = batch.nodes.graph
    masks = torch.zeros(1, *graph.allowed.shape)
    masks[:, :, 0] = 1
    with torch.no_grad():
        return masked_logits(batch.nodes, batch.ids, batch.reference, masks)[0]
