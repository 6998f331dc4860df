"""HISP: slopes by gates against differences of runs with gates a little closed, and Michel's score."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens.circuits import score_edges
from lens.circuits.known import induction_transformer
from lens.circuits.scores import hisp
from lens.common.errors import LensError
from tests.lens.circuit_models import error, small_model, small_task


def places(model, name):
    """The module that makes a node's number, and its slice of the last axis."""
    inner, kind = model.model, model.model.config.model_type
    layer = int(name[1:].split(".")[0])
    block = (inner.transformer.h if kind == "gpt2" else inner.model.layers)[layer]
    if name[0] == "m":
        return block.mlp, slice(None)
    part = name[-2]
    head = int(name.split("<")[0].split("h" if ".h" in name else "kv")[-1])
    if kind == "gpt2":
        size, width = block.attn.head_dim, block.attn.embed_dim
        start = width * "qkv".index(part) + size * head
        return block.attn.c_attn, slice(start, start + size)
    size = block.self_attn.head_dim
    return getattr(block.self_attn, f"{part}_proj"), slice(size * head, size * (head + 1))


def naive(model, task, name, ablation, step=1e-4):
    """|slope| [prompts] from two runs with the gate at 1 + step and 1 - step."""
    module, part = places(model, name)
    seen = []
    hook = module.register_forward_hook(lambda _, __, out: seen.append(out[..., part].clone()))
    with torch.no_grad():
        model.model(task.corrupt)
    hook.remove()
    reference = seen[0] if ablation == "counterfactual" else torch.zeros_like(seen[0])
    found = []
    for gate in (1 + step, 1 - step):

        def close(_, __, out, gate=gate):
            out = out.clone()
            out[..., part] = reference + gate * (out[..., part] - reference)
            return out

        hook = module.register_forward_hook(close)
        with torch.no_grad():
            logits = model.model(task.clean).logits
        hook.remove()
        found.append(task.measure(logits, torch.arange(task.n)))
    return ((found[0] - found[1]) / (2 * step)).abs().numpy()


@pytest.mark.parametrize(("kind", "kv"), [("gpt2", "head"), ("llama", "group")])
@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
def test_scores_are_slopes_by_gates(kind, kv, ablation):
    model, task = small_model(kind), small_task()
    found = hisp(
        model, task, baseline=ablation, normalize=False, kv=kv, batch_size=2, progress=False
    )
    twin = np.stack([naive(model, task, name, ablation) for name in found.nodes], 1)
    for number, name in enumerate(found.nodes):
        assert error(found.per_prompt[:, number], twin[:, number]) < 1e-5, name


def test_values_closed_to_zero_give_the_score_of_michel():
    model, task = small_model("llama"), small_task()
    gates = hisp(model, task, baseline="zero", normalize=False, progress=False)
    heads = lens.heads.importance(model, task, method=lens.heads.Gradient("prompt"), progress=False)
    layers, count = heads.values.shape
    mine = [
        gates.per_prompt[:, gates.nodes.index(f"a{layer}.h{head}<v>")]
        for layer in range(layers)
        for head in range(count)
    ]
    assert error(np.stack(mine), heads.per_prompt.reshape(layers * count, -1)) < 1e-9


def test_gate_of_an_mlp_is_the_sum_of_its_edges():
    model, task = small_model("gpt2"), small_task()
    gates = hisp(model, task, normalize=False, progress=False)
    edges = score_edges(model, task, method="eap", progress=False)
    leaving = [edge.startswith("m0->") for edge in edges.graph.edges]
    expected = np.abs(edges.per_prompt[:, leaving].sum(1))
    assert error(gates.per_prompt[:, gates.nodes.index("m0")], expected) < 1e-9


def test_layers_have_length_one_and_keep_their_order():
    model, task = small_model("llama"), small_task()
    raw = hisp(model, task, normalize=False, progress=False)
    found = hisp(model, task, batch_size=3, progress=False)
    by_layer = found.values.reshape(3, -1)
    np.testing.assert_allclose(np.linalg.norm(by_layer, axis=1), 1)
    for mine, its in zip(by_layer, raw.values.reshape(3, -1), strict=True):
        np.testing.assert_allclose(mine / mine[0], its / its[0])
    table = found.table()
    assert (table["value"].diff().dropna() <= 0).all()
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_known_circuit():
    known = induction_transformer(beta=4)
    found = hisp(known.model, known.task, normalize=False, progress=False)
    values = dict(zip(found.nodes, found.values, strict=True))
    assert found.table()["node"][0] == "a1.h0<q>"  # the last token was changed
    assert all(values[f"{head}<{part}>"] == 0 for head in known.inactive for part in "qkv")
    assert set(found.top(1).edges) == {"input->a1.h0<q>", "a1.h0->logits", "input->logits"}
    # each layer's largest is lifted to about 1, so a normalised order says little across layers
    lifted = hisp(known.model, known.task, progress=False)
    assert values["a0.h0<v>"] < 0.5 * values["a1.h0<q>"]
    assert lifted.values[lifted.nodes.index("a0.h0<v>")] > 0.9
    saturated = induction_transformer(beta=30)
    blind = hisp(saturated.model, saturated.task, normalize=False, progress=False)
    assert blind.values.max() < 1e-4  # as the module says: a gate at 1 sees nothing here


def test_circuit_is_of_all_edges_between_its_nodes():
    model, task = small_model("gpt2"), small_task()
    found = hisp(model, task, progress=False)
    circuit = found.top(6, prune=False)
    chosen = set(found.table()["node"][:6])
    writers = {"input"} | {node.split("<")[0] for node in chosen}
    expected = {
        edge
        for edge in found.graph.edges
        if edge.split("->")[0] in writers and edge.split("->")[1] in chosen | {"logits"}
    }
    assert set(circuit.edges) == expected
    assert circuit.made == "hisp, top 6 nodes"
    assert set(found.top(6).edges) <= expected
    drawn: Any = found.plot().data
    np.testing.assert_array_equal(np.ravel(drawn[0].z), found.values)
    assert drawn[0].x[-1] == "mlp"
    assert "GateScores(hisp, counterfactual ablation, on 'drawn'" in repr(found)


def test_refusals():
    model, task = small_model("gpt2"), small_task()
    with pytest.raises(
        LensError, match="baseline must be one of 'counterfactual', 'zero', got 'mean'"
    ):
        hisp(model, task, baseline="mean")
    with pytest.raises(LensError, match="batch_size must be a positive integer, got 0"):
        hisp(model, task, batch_size=0)
    with pytest.raises(LensError, match="has no corrupt prompts"):
        hisp(model, replace(task, corrupt=None))
    with pytest.raises(LensError, match="the metric has no gradient"):
        hisp(model, task.with_metric("accuracy"), progress=False)
    with pytest.raises(LensError, match="at its best where the model is"):
        hisp(model, task.with_kl(model))
    with pytest.raises(LensError, match="top takes 0 to 20 nodes, got 21"):
        hisp(model, task, progress=False).top(21)
