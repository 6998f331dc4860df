"""Relevance patching: the forward pass stays, relevance is conserved, and rules are those of a naive twin."""

import numpy as np
import pytest
import torch
from torch import nn

from lens.circuits import score_edges
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known import induction_transformer, tracr
from lens.circuits.scores.relp import relevance_rules
from lens.common.errors import LensError
from lens.passes.logits import logits_of
from tests.lens.circuit_models import KINDS, error, small_model, small_task


def cuts(graph: Graph):
    """Edges [cuts, edges] across each boundary between layers: whoever is before, to whoever is after."""
    reader, writer = graph.ends
    found = []
    for layer in range(graph.layers + 1):
        after = (
            graph.attention_readers(layer).start if layer < graph.layers else len(graph.readers) - 1
        )
        before = graph.heads_of(layer).start
        found.append((reader >= after) & (writer < before))
    return np.stack(found)


def test_relevance_is_conserved_through_norms_gates_and_activations():
    model, task = small_model("llama"), small_task(rows=3)
    found = score_edges(model, task, method="relp-values", baseline="zero")
    crossing = cuts(found.graph)
    metric = task.evaluate(model).numpy()
    assert error(found.per_prompt @ crossing.T, metric[:, None].repeat(len(crossing), 1)) < 1e-9
    plain = score_edges(model, task, method="eap", baseline="zero")
    assert error(plain.per_prompt @ crossing.T, metric[:, None].repeat(len(crossing), 1)) > 0.1


def test_rules_change_nothing_forward():
    for kind in KINDS:
        model, task = small_model(kind), small_task(rows=2)
        plain = logits_of(model, task.clean).detach()
        with relevance_rules(find_nodes(model)):
            assert error(logits_of(model, task.clean).detach(), plain) < 1e-12


def test_a_linear_model_is_scored_exactly():
    """No norm, no MLP, and prompts that differ in values alone: patterns are the same on both."""
    known = induction_transformer(4, dtype="float64")
    task = known.tasks["successor"]
    exact = score_edges(known.model, task, method="exact").values
    for method in ("relp", "relp-values", "eap"):
        assert error(score_edges(known.model, task, method=method).values, exact) < 1e-9


class Twin(nn.Module):
    """The last MLP of a GPT-2 and what follows, with the rules written into the forward pass."""

    def __init__(self, model) -> None:
        super().__init__()
        self.block, self.last = model.transformer.h[-1], model.transformer.ln_f
        self.head = model.lm_head

    @staticmethod
    def norm(norm, x):
        size = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / size * norm.weight + norm.bias

    def forward(self, residual):
        mlp = self.block.mlp
        inside = mlp.c_fc(self.norm(self.block.ln_2, residual))
        inside = inside * (mlp.act(inside) / inside).detach()
        return self.head(self.norm(self.last, residual + mlp.c_proj(inside)))


def test_rules_are_those_of_a_naive_twin():
    model, task = small_model("gpt2"), small_task(rows=3)
    found = score_edges(model, task, method="relp")
    streams, embedded = [], []
    parts = model.model.transformer
    handles = [
        parts.h[-1].ln_2.register_forward_pre_hook(lambda _, given: streams.append(given[0])),
        parts.drop.register_forward_hook(lambda _, __, given: embedded.append(given.detach())),
    ]
    logits_of(model, task.clean)
    logits_of(model, task.corrupt_or_refuse())
    for handle in handles:
        handle.remove()
    twin = Twin(model.model)
    x = streams[0].detach().requires_grad_()
    value = task.measure(twin(x), torch.arange(3)).sum()
    (slope,) = torch.autograd.grad(value, x)
    # the gradient by the stream before the last MLP is that by `m1`'s input and by the logits'
    expected = (slope * (embedded[0] - embedded[1])).sum((1, 2)).numpy()
    edges = found.graph.find(["input->m1", "input->logits"])
    assert error(found.per_prompt[:, edges].sum(1), expected) < 1e-10


def test_constant_patterns_score_no_query_and_no_key():
    found = score_edges(small_model("gpt2"), small_task(), method="relp-values")
    into = np.char.endswith(found.graph.edges, "<q>") | np.char.endswith(found.graph.edges, "<k>")
    assert (found.values[into] == 0).all()
    assert score_edges(small_model("gpt2"), small_task(), method="relp").values[into].any()


def test_a_relu_has_its_slope():
    known = tracr("frac_prevs", dtype="float64")
    found = score_edges(known.model, known.task, method="relp", baseline="zero").values
    plain = score_edges(known.model, known.task, method="eap", baseline="zero").values
    assert error(found, plain) < 1e-12


class Wrapped(nn.Module):
    """An MLP or a norm under a name that nobody knows."""

    def __init__(self, inside) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, given):
        return self.inside(given)


def test_unknown_parts_are_refused():
    model, task = small_model("gpt2"), small_task()
    block = model.model.transformer.h[0]
    block.mlp = Wrapped(block.mlp)
    with pytest.raises(LensError, match="no activation function was found in Wrapped"):
        score_edges(model, task, method="relp")
    model = small_model("gpt2")
    model.model.transformer.ln_f = Wrapped(model.model.transformer.ln_f)
    with pytest.raises(LensError, match="GPT2LMHeadModel does not compute what its parts say"):
        score_edges(model, task, method="relp")
