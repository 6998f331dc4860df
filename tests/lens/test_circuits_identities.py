"""Identities of edge scores that hold exactly, each against a computation that knows no edges."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lens
from lens.circuits import score_edges
from lens.circuits.graph.activations import read_activations
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known.program import ProgramConfig, ProgramModel
from lens.circuits.scores.attribution import head_slopes
from lens.circuits.scores.methods import EapIg
from lens.heads import importance
from tests.lens.circuit_models import KINDS, error, small_model, small_task, stepped


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return small_model(request.param)


def embedding_and_last_norm(model):
    """The modules whose output enters the first layer, and whose input is the last residual stream."""
    inner = model.model
    if hasattr(inner, "blocks"):
        return inner.blocks[0], inner.ln_final
    if hasattr(inner, "transformer"):
        return inner.transformer.h[0], inner.transformer.ln_f
    if hasattr(inner, "gpt_neox"):
        return inner.gpt_neox.layers[0], inner.gpt_neox.final_layer_norm
    return inner.model.layers[0], inner.model.norm


def streams(model, ids):
    """What enters the first layer and the last norm, and the logits of a plain run with autograd."""
    kept = []

    def keep(_, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        kept.append(hidden)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    handles = [
        part.register_forward_pre_hook(keep, with_kwargs=True)
        for part in embedding_and_last_norm(model)
    ]
    logits = model.model(ids).logits
    for handle in handles:
        handle.remove()
    return kept[0], kept[1], logits


def test_cuts_at_the_input_and_at_the_logits(model):
    """sum over v of EAP(input->v) = grad_x . (x - x'); sum over u of EAP(u->logits) = grad_r . (r - r')."""
    task = small_task()
    found = score_edges(model, task, method="eap")
    x, r, logits = streams(model, task.clean)
    value = task.measure(logits, torch.arange(task.n)).sum()
    by_x, by_r = torch.autograd.grad(value, [x, r])
    other_x, other_r, _ = streams(model, task.corrupt_or_refuse())
    reader, writer = found.graph.ends
    into_logits = reader == len(found.graph.readers) - 1
    with torch.no_grad():
        at_input = (by_x * (x - other_x)).sum((1, 2)).numpy()
        at_logits = (by_r * (r - other_r)).sum((1, 2)).numpy()
    assert error(found.per_prompt[:, writer == 0].sum(1), at_input) < 1e-10
    assert error(found.per_prompt[:, into_logits].sum(1), at_logits) < 1e-10


def test_a_head_is_worth_the_sum_of_what_leaves_it(model):
    """Node attribution patching of u = sum of EAP over its outgoing edges."""
    task = small_task()
    found = score_edges(model, task, method="eap")
    by_node = importance(
        model, task, method="attribution", baseline="counterfactual", progress=False
    ).values
    graph = found.graph
    summed = np.zeros_like(by_node)
    for layer in range(graph.layers):
        for head in range(graph.heads):
            leaving = graph.ends[1] == graph.writers.index(f"a{layer}.h{head}")
            summed[layer, head] = found.values[leaving].sum()
    assert error(summed, by_node) < 1e-10


def linear_model():
    """Two layers, uniform attention, an MLP that stays on the rising side of its ReLU, no norm."""
    torch.manual_seed(5)
    model = ProgramModel(
        ProgramConfig(
            vocab_size=23, hidden_size=11, num_hidden_layers=2, num_attention_heads=3, head_dim=5,
            mlp_size=13, max_position_embeddings=8,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln" not in f".{name}":
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        for block in model.blocks:
            attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
            for part in ("q", "k"):
                attention.get_parameter(f"{part}.weight").zero_()
                attention.get_parameter(f"{part}.bias").zero_()
            mlp.get_parameter("fc_in.bias").fill_(200.0)
            written = mlp.get_parameter("fc_out.weight").sum(1) * 200
            mlp.get_parameter("fc_out.bias").copy_(-written)
    return lens.load(nn.Module.double(model).eval())


def test_in_a_linear_model_gradients_are_exact_and_every_cut_is_the_whole_effect():
    model, task = linear_model(), small_task()
    change = (task.evaluate(model) - task.evaluate(model, corrupt=True)).numpy()
    exact = score_edges(model, task, method="exact")
    graph = exact.graph
    reader, writer = graph.ends
    cuts = [reader == len(graph.readers) - 1, writer == 0]
    for layer in range(graph.layers + 1):
        last = layer == graph.layers
        after = len(graph.readers) - 1 if last else graph.attention_readers(layer).start
        cuts.append((reader >= after) & (writer < graph.heads_of(layer).start))
        if not last:  # between the attention and the MLP of a layer
            before_mlp = writer <= graph.heads_of(layer).stop - 1
            cuts.append((reader >= graph.mlp_reader(layer)) & before_mlp)
    for method in ("exact", "eap", "eap-ig", "clean-corrupted", "atp*", "atp*-together"):
        found = score_edges(model, task, method=method)
        assert error(found.per_prompt, exact.per_prompt) < 1e-9, method
        for cut in cuts:
            assert error(found.per_prompt[:, cut].sum(1), change) < 1e-9, method
    patterns = np.char.endswith(graph.edges, "<q>") | np.char.endswith(graph.edges, "<k>")
    assert np.abs(exact.per_prompt[:, patterns]).max() < 1e-9
    whole = exact.per_prompt.sum(1)  # paths are counted once for each of their edges
    assert np.abs(whole - change).min() > 0.1 * np.abs(change).max()


def test_other_cuts_of_eap_ig_are_not_the_whole_effect_where_there_are_norms():
    model, task = small_model("gpt2"), small_task()
    residuals = []
    for steps in (16, 32):
        found = score_edges(model, task, method=EapIg(steps))
        assert found.total is not None
        assert found.residual == pytest.approx(0, abs=2e-3 * abs(found.total))
        into_logits = found.graph.ends[0] == len(found.graph.readers) - 1
        residuals.append(found.values[into_logits].sum() - found.total)
    assert abs(residuals[0]) > 0.05 * abs(found.total)
    assert residuals[1] == pytest.approx(residuals[0], rel=0.02)  # more steps do not help


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_integrated_gradients_of_one_head_are_its_exact_effect(kind):
    model, task = small_model(kind), small_task()
    nodes = find_nodes(model)
    layer, head = 1, 2
    _, clean = read_activations(nodes, task.clean)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    change = torch.zeros_like(clean.heads[layer])
    change[:, head] = (clean.heads[layer] - reference.heads[layer])[:, head]
    steps, found = 64, torch.zeros(task.n, dtype=torch.float64)
    for step in range(steps):
        share = 1 - (step + 0.5) / steps  # from the clean run towards the reference
        at = head_slopes(
            nodes,
            task.clean,
            lambda logits: task.measure(logits, torch.arange(task.n)),
            {("heads", layer): clean.heads[layer] - share * change},
        )
        found += (at.heads[layer] * change).sum((1, 2, 3)) / steps
    exact = importance(model, task, method="ablation", baseline="counterfactual", progress=False)
    expected = exact.per_prompt[layer, head]
    assert error(found, expected) < 2e-4
    by_gradient = importance(
        model, task, method="attribution", baseline="counterfactual", progress=False
    )
    assert error(by_gradient.per_prompt[layer, head], expected) > 0.01


@pytest.mark.parametrize("method", ["eap-ig", "atp*"])
def test_tokens_after_the_answer_change_no_score(model, method):
    task = small_task(rows=3)
    generator = torch.Generator().manual_seed(9)

    def longer(ids):
        return torch.cat([ids, torch.randint(3, 23, (3, 4), generator=generator)], 1)

    padded = replace(task, clean=longer(task.clean), corrupt=longer(task.corrupt_or_refuse()))
    expected = score_edges(model, task, method=stepped(method, 3))
    found = score_edges(model, padded, method=stepped(method, 3))
    assert error(found.values, expected.values) < 1e-9


def test_heads_in_another_order_are_the_same_heads():
    model, task = small_model("attention_only"), small_task()
    expected = score_edges(model, task, method="eap-ig")
    graph, order = expected.graph, [2, 0, 1]  # head 0 of the new model is head 2 of the old one
    with torch.no_grad():
        for block in model.model.blocks:
            for name in ("q", "k", "v"):
                part = getattr(block.attn, name)
                for tensor in (part.weight, part.bias):
                    tensor.copy_(tensor.unflatten(0, (3, -1))[order].flatten(0, 1))
            out = block.attn.o.weight
            out.copy_(out.unflatten(1, (3, -1))[:, order].flatten(1, 2))
    found = score_edges(model, task, method="eap-ig")

    def renamed(edge):
        for new, old in enumerate(order):
            edge = edge.replace(f".h{new}", f".H{old}")
        return edge.replace(".H", ".h")

    same = expected.graph.find([renamed(edge) for edge in graph.edges])
    assert (same != np.arange(graph.n)).any()
    assert error(found.per_prompt, expected.per_prompt[:, same]) < 1e-10
