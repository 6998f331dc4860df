"""AtP* of edges: equal to a naive softmax, to the gradient in the limit, and right where that is 0."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lens.circuits import score_edges
from lens.circuits.checks.recovery import recovery
from lens.circuits.graph.activations import read_activations
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known import induction_transformer, logic_gate
from lens.circuits.scores.atp import atp_star, atp_star_grad_drop, atp_star_together
from lens.circuits.scores.attribution import head_slopes
from lens.circuits.scores.batch import Batch
from lens.circuits.scores.methods import EapIg
from lens.circuits.scores.scoring import eap
from lens.common.errors import LensError
from tests.lens.circuit_models import KINDS, error, small_model, small_task
from tests.tiers import first

QUERY = "input->a1.h0<q>"


def make_batch(model, task, kv="head", share=1.0):
    """All prompts; references moved towards the clean outputs so that `share` of the way is left."""
    nodes = find_nodes(model, kv=kv)
    _, clean = read_activations(nodes, task.clean)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    reference = clean.minus(clean.minus(reference).times(share))
    rows = torch.arange(task.n)

    def measure(logits):
        return task.sign * task.measure(logits, rows)

    differences = clean.minus(reference)
    return Batch(nodes, task.clean, measure, reference, differences, 1, "midpoint")


@pytest.mark.parametrize("kind", first(KINDS, "llama", "gpt_neox"))
@pytest.mark.parametrize("kv", ["head", "group"])
def test_small_changes_are_scored_as_by_the_gradient(kind, kv):
    batch = make_batch(small_model(kind), small_task(rows=3), kv, share=1e-6)
    expected = eap(batch)
    assert error(atp_star(batch), expected) < 1e-4
    assert error(atp_star_together(batch), expected) < 1e-4


def softmaxed(q, k, v):
    hidden = torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool()
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights, weights @ v


@pytest.mark.parametrize(
    ("kind", "edge"), [("gpt2", "m0->a1.h2"), ("attention_only", "a0.h1->a2.h0")]
)
@torch.no_grad()
def test_effects_are_those_of_a_naive_softmax(kind, edge):
    batch = make_batch(small_model(kind), small_task(rows=3))
    nodes, graph = batch.nodes, batch.nodes.graph
    writer, reader = edge.split("->")
    layer, head = int(reader[1]), int(reader[-1])
    at = head_slopes(nodes, batch.ids, batch.measure)
    parts = nodes.layers[layer]
    if writer[0] == "m":
        change = -batch.differences.mlps[0]
    else:
        number = int(writer[-1])
        change = -batch.differences.heads[0][:, number]
        change = change @ nodes.layers[0].block.output[number]
    clean = at.residuals[layer]

    def read(part, residual):
        weight, bias = parts.weights[part]
        return parts.block.norm.forward(residual) @ weight[head] + (
            0 if bias is None else bias[head]
        )

    q, k, v = (read(part, clean) for part in range(3))
    slope = at.heads[layer][:, head]
    _, output = softmaxed(q, k, v)
    _, by_query = softmaxed(read(0, clean + change), k, v)
    patched = read(1, clean + change)
    _, by_key = softmaxed(q, patched, v)
    alone = 0
    for token in range(k.shape[1]):
        one = k.clone()
        one[:, token] = patched[:, token]
        alone = alone - (slope * (softmaxed(q, one, v)[1] - output)).sum((1, 2))
    query, key = graph.find([f"{edge}<q>", f"{edge}<k>"])
    found, together = atp_star(batch), atp_star_together(batch)
    expected = -(slope * (by_query - output)).sum((1, 2))
    assert error(found[:, query], expected) < 1e-9
    assert error(together[:, query], expected) < 1e-9
    assert error(found[:, key], alone) < 1e-9
    assert error(together[:, key], -(slope * (by_key - output)).sum((1, 2))) < 1e-9
    others = ~np.char.endswith(graph.edges, "<q>") & ~np.char.endswith(graph.edges, "<k>")
    assert error(found[:, others], eap(batch)[:, others]) < 1e-12


def value(scores, edge):
    return scores.values[scores.graph.find([edge])[0]]


def test_a_saturated_softmax_is_seen_where_gradients_fail():
    known = induction_transformer(30, dtype="float64")

    def scored(**options):
        return value(score_edges(known.model, known.task, **options), QUERY)

    assert scored(method="eap") == pytest.approx(0, abs=1e-9)
    assert scored(method=EapIg(5, "left")) == pytest.approx(0.11839, abs=1e-5)
    for method in ("exact", "atp*", "atp*-together"):
        assert scored(method=method) == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("beta", [4, 30])
def test_induction_circuits_are_found_but_for_what_a_later_softmax_hides(beta):
    known = induction_transformer(beta, dtype="float64")
    for name, task in known.tasks.items():
        found = score_edges(known.model, task, method="atp*-together")
        area = recovery(found, known.visible[name]).auroc
        hidden = beta == 30 and name == "first token"
        if not hidden:
            assert area == 1
            continue
        # what goes into L0H0 acts through the key of L1H0 alone, whose slope is 0
        assert value(found, "input->a0.h0<v>") == pytest.approx(0, abs=1e-9)
        assert value(found, "a0.h0->a1.h0<k>") == pytest.approx(2, abs=1e-9)


def test_an_or_gate_is_hidden_from_every_single_ablation():
    known = logic_gate("or", dtype="float64")
    for method in ("atp*", "eap", "exact"):
        found = score_edges(known.model, known.task, method=method)
        assert value(found, "a0.h0->m0") == pytest.approx(0, abs=1e-12)


def test_grad_drop_is_the_mean_over_blocked_layers():
    model, task = small_model("gpt2"), small_task(rows=2)
    batch = make_batch(model, task)
    found = atp_star_grad_drop(batch)
    graph = batch.nodes.graph
    assert (found >= 0).all()
    into_last = graph.find(["input->logits"])[0]
    # readers of the last norm are behind no layer: all passes agree, 2 / (2 - 1) of plain
    assert found[:, into_last] == pytest.approx(2 * np.abs(eap(batch)[:, into_last]))
    # the last MLP's input counts only in the pass that blocks the other layer
    through = graph.find(["m0->m1"])[0]
    assert found[:, through] == pytest.approx(np.abs(eap(batch)[:, through]))


def test_scores_depend_on_no_batch():
    model, task = small_model("llama"), small_task()
    whole = score_edges(model, task, method="atp*")
    parts = score_edges(model, task, method="atp*", batch_size=2)
    assert error(parts.per_prompt, whole.per_prompt) < 1e-10


def test_refusals():
    known = logic_gate("and")
    with pytest.raises(LensError, match="needs another; this model has one"):
        score_edges(known.model, known.task, method="atp*-grad-drop")
    model, task = small_model("gpt2"), small_task()
    with pytest.raises(LensError, match="flat at the clean prompts"):
        score_edges(model, task.with_kl(model), method="atp*")
    with pytest.raises(LensError, match="has no corrupt prompts"):
        score_edges(model, replace(task, corrupt=None), method="atp*")
