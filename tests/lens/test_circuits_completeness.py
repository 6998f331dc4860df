"""Completeness and minimality: gates whose answer is known, and nodes replaced by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lens.circuits import run_circuit, score_edges
from lens.circuits.checks import completeness, minimality
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import make_circuit
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.selection import without
from lens.circuits.known import induction_transformer, logic_gate
from lens.common.errors import LensError
from tests.lens.circuit_models import error, small_model, small_task

HALF = ("input->a0.h0<v>", "a0.h0->m0", "m0->logits")
OTHER = ("input->a0.h1<v>", "a0.h1->m0")


def gate_circuit(known, edges):
    graph = find_nodes(known.model).graph
    return make_circuit(graph, edges, ablation=Ablation("counterfactual"))


def search(known, circuit, **options):
    options = {"runs": 1, "steps": 1, "candidates": 2, "draws": 1, **options}
    return completeness(known.model, known.task, circuit, progress=False, **options)


def without_heads(model, task, heads):
    """Metric [prompts] of a GPT-2 whose heads' z are those of the corrupt prompts."""
    attentions = [block.attn for block in model.model.transformer.h]
    size = attentions[0].head_dim
    kept: list[torch.Tensor] = []
    handles = [
        a.c_proj.register_forward_pre_hook(lambda _, x: kept.append(x[0])) for a in attentions
    ]
    with torch.no_grad():
        model.model(task.corrupt)
    for handle in handles:
        handle.remove()

    def put(layer):
        def hook(_: Any, inputs: Any) -> Any:
            z = inputs[0].clone()
            for at, head in heads:
                if at == layer:
                    z[..., size * head : size * (head + 1)] = kept[layer][
                        ..., size * head : size * (head + 1)
                    ]
            return (z,)

        return hook

    handles = [a.c_proj.register_forward_pre_hook(put(n)) for n, a in enumerate(attentions)]
    with torch.no_grad():
        logits = model.model(task.clean).logits
    for handle in handles:
        handle.remove()
    return task.measure(logits, torch.arange(task.n)).numpy()


def test_half_of_an_or_is_faithful_and_incomplete():
    known = logic_gate("or", dtype="float64")
    found = search(known, gate_circuit(known, HALF))
    assert found.gaps[0] == pytest.approx(0, abs=1e-12)  # faithful as it stands
    assert found.sets[found.worst] == ("a0.h0",)
    assert found.gaps[found.worst] == pytest.approx(1)  # the model has the other input, it has not
    assert found.incompleteness == pytest.approx(1)
    whole = search(known, gate_circuit(known, (*HALF, *OTHER)))
    assert whole.incompleteness == pytest.approx(0, abs=1e-12)


def test_the_largest_gap_on_the_way_is_kept_and_random_sets_are_others():
    """Without both heads circuit and model are alike again; the last set alone was kept, and random ones were the same."""
    known = logic_gate("or", dtype="float64")
    found = search(known, gate_circuit(known, (*HALF, "a0.h1->logits")), steps=5, runs=3, draws=4)
    assert found.sets == ((), ("a0.h0",), ("a0.h1",))  # one run, of which two sets are others
    assert found.kind == ("none", "greedy", "random")
    assert found.incompleteness == pytest.approx(1)
    assert found.tried == 3
    (said,) = found.findings()
    assert said == (
        "Without a0.h0 model and circuit differ by +1 logit_difference, 100% of what ablating everything changes: the "
        "largest gap of 5 sets, looked for on the prompts it is of (1); 1 random one of that size by 0 on average."
    )
    drawn = replace(found, model=found.model[[0, 0, 1]], circuit=found.circuit[[0, 0, 1]])
    assert drawn.worst == 2  # a random set is no other beside itself
    assert drawn.findings()[0].endswith("there is no random one of that size beside it.")
    alone = search(known, gate_circuit(known, HALF))
    assert alone.kind == ("none", "greedy")
    assert alone.findings()[0].endswith("there is no random one of that size beside it.")


def test_a_task_that_ablation_leaves_as_it_is_has_no_completeness():
    known = logic_gate("or", dtype="float64")
    same = replace(known.task, wrong=known.task.correct)
    with pytest.raises(LensError, match="ablating every edge does not change the metric"):
        completeness(known.model, same, gate_circuit(known, HALF), runs=1, steps=1, progress=False)


def test_the_model_without_heads_is_the_model_with_their_outputs_replaced():
    model, task = small_model("gpt2"), small_task()
    circuit = score_edges(model, task, method="eap").top(30)
    found = completeness(
        model, task, circuit, runs=2, steps=2, candidates=2, draws=2, progress=False
    )
    assert found.kind == ("none", "greedy", "greedy", "random", "random")
    for names, values in zip(found.sets, found.model, strict=True):
        heads = [(int(name[1]), int(name[4])) for name in names]
        assert error(values, without_heads(model, task, heads)) < 1e-11
    table = found.table()
    assert list(table["size"]) == [0, 2, 2, 2, 2]
    assert table["gap"].to_numpy() == pytest.approx((found.model - found.circuit).mean(1))
    assert (table["low"] <= table["gap"]).all()
    assert (table["high"] >= table["gap"]).all()
    assert "Completeness('drawn', 5 prompts: largest gap" in repr(found)


def test_greedy_steps_take_the_largest_gap_among_all_candidates():
    model, task = small_model("gpt2"), small_task()
    circuit = score_edges(model, task, method="eap").top(30)
    heads = [name for name in circuit.nodes if name.startswith("a")]
    found = completeness(
        model, task, circuit, runs=1, steps=1, candidates=len(heads), draws=1, progress=False
    )
    sizes = {}
    for name in heads:  # one at a time, each by itself
        kept = circuit.kept & ~np.array(
            [edge.startswith(f"{name}->") for edge in circuit.graph.edges]
        )
        alone = make_circuit(circuit.graph, np.array(circuit.graph.edges)[kept].tolist())
        inside = run_circuit(model, task, alone, progress=False).metric[0].mean()
        outside = without_heads(model, task, [(int(name[1]), int(name[4]))]).mean()
        sizes[name] = abs(outside - inside)
    assert found.sets[1] == (max(sizes, key=lambda name: sizes[name]),)


def test_every_node_of_an_and_is_needed_and_none_of_an_or():
    expected = {"and": [1, 1], "or": [0, 0], "sum": [1, 1]}
    for gate, drops in expected.items():
        known = logic_gate(gate, dtype="float64")
        circuit = gate_circuit(known, (*HALF, *OTHER))
        found = minimality(known.model, known.task, circuit, draws=3, progress=False)
        assert found.nodes == ("a0.h0", "a0.h1", "m0")
        assert found.drops[:2, 0] == pytest.approx(drops, abs=1e-12), gate


def test_a_set_that_is_out_already_shows_what_it_made_up_for():
    known = logic_gate("or", dtype="float64")
    circuit = gate_circuit(known, (*HALF, *OTHER))
    found = minimality(
        known.model, known.task, circuit, given={"a0.h0": ["a0.h1"]}, draws=2, progress=False
    )
    assert found.drops[:, 0] == pytest.approx([1, 0, 1], abs=1e-12)
    assert found.given == (("a0.h1",), (), ())
    assert found.needed() == ("a0.h0", "m0")
    one = minimality(known.model, known.task, circuit, nodes=["m0"], draws=2, progress=False)
    assert (one.nodes, one.drops[0, 0]) == (("m0",), pytest.approx(1))
    table = found.table()
    assert list(table["node"])[-1] == "a0.h1"
    assert table["low"].isna().all()  # one prompt has no interval


def test_the_part_that_leaves_a_random_circuit_is_no_input():
    """Circuits of two edges are mostly of the input's: taken out it was a part that did as much as everything."""
    known = logic_gate("sum", dtype="float64")
    seen = []

    def taken(graph, kept, names):
        seen.extend(names)
        return without(graph, kept, names)

    circuit = gate_circuit(known, ["input->a0.h0<v>", "a0.h0->logits"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens.circuits.checks._minimality.without", taken)
        minimality(known.model, known.task, circuit, draws=30, progress=False)
    assert len(seen) > 30
    assert "input" not in seen


def test_nodes_that_are_there_for_nothing_are_found():
    known = induction_transformer(8, dtype="float64")
    graph = find_nodes(known.model).graph
    circuit = make_circuit(graph, (*known.edges, "input->a0.h1<v>", "a0.h1->logits"))
    found = minimality(known.model, known.task, circuit, draws=4, progress=False)
    shares = dict(zip(found.nodes, found.shares, strict=True))
    assert shares["a1.h0"] == pytest.approx(1, abs=1e-2)
    assert shares["a0.h1"] == pytest.approx(0, abs=1e-9)
    assert "a0.h1" not in found.needed()
    assert np.abs(found.random).max() <= abs(found.whole) + 1e-9


def test_what_has_no_parts_is_refused():
    known = logic_gate("and")
    bare = gate_circuit(known, ["input->logits"])
    with pytest.raises(LensError, match="the circuit has no heads to take away"):
        search(known, bare)
    with pytest.raises(LensError, match="no heads and no MLPs"):
        minimality(known.model, known.task, bare)
    circuit = gate_circuit(known, HALF)
    with pytest.raises(LensError, match="nodes must be heads and MLPs of the circuit"):
        minimality(known.model, known.task, circuit, nodes=["a0.h1"])
    with pytest.raises(LensError, match="steps must be a positive integer, got 0"):
        search(known, circuit, steps=0)
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        minimality(known.model, known.task, circuit, draws=0)
    with pytest.raises(LensError, match=r"given names 'a0\.h1', which is no node of the circuit"):
        minimality(known.model, known.task, circuit, given={"a0.h1": []})
