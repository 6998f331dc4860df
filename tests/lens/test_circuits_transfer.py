"""Circuits on each other's tasks: against each one run alone, and where the answer is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lens.circuits import make_circuit, score_edges
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known import induction_transformer, logic_gate
from lens.circuits.reuse import transfer
from lens.circuits.reuse._sides import with_heads_renamed
from lens.circuits.reuse._transfer import Transfer
from lens.common.errors import LensError
from tests.lens.circuit_models import small_model, small_task


def test_each_number_is_that_of_the_circuit_run_alone():
    model = small_model("llama")
    tasks = [replace(small_task(seed), name=f"task {seed}") for seed in (0, 1, 4)]
    circuits = [score_edges(model, task, progress=False).top(90) for task in tasks[:2]]
    found = transfer(model, tasks, circuits, draws=1, seed=5, progress=False)
    draw = np.random.default_rng(5)
    for number, circuit in enumerate(circuits):
        drawn = [with_heads_renamed(circuit.graph, circuit.kept, draw)]
        assert {kept.sum() for kept in drawn} == {circuit.n}
        for other, task in enumerate(tasks):
            for kept, value in zip(
                [circuit.kept, *drawn],
                [found.faithfulness[number, other], *found.renamed[number, other]],
                strict=True,
            ):
                alone = run_circuits(model, task, kept[None], circuit.ablation, progress=False)
                assert value == pytest.approx(alone.faithfulness()[0], rel=1e-6)
            low, high = run_circuits(
                model, task, circuit.kept[None], circuit.ablation, progress=False
            ).interval(5)
            assert found.low[number, other] == pytest.approx(low[0], rel=1e-6)
            assert found.high[number, other] == pytest.approx(high[0], rel=1e-6)
    sets = [set(circuit.edges) for circuit in circuits]
    assert found.shared[0, 1] == len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert np.diag(found.shared).tolist() == [1, 1]
    table = found.table()
    assert table["circuit"].tolist() == ["task 0"] * 3 + ["task 1"] * 3
    assert table["task"].tolist() == ["task 0", "task 1", "task 4"] * 2
    drawn_map: Any = found.plot().data
    np.testing.assert_array_equal(drawn_map[0].z, found.faithfulness)
    assert "Transfer(2 circuits × 3 tasks" in repr(found)


def test_a_circuit_serves_the_tasks_whose_edges_it_has():
    """Ablating only the two edges that a task sees breaks it, whatever else is kept."""
    known = induction_transformer(beta=30)
    names = list(known.tasks)
    graph = find_nodes(known.model).graph
    circuits = [
        make_circuit(graph, known.visible[name], task=name, model=known.model.name)
        for name in names
    ]
    found = transfer(
        known.model, [known.tasks[name] for name in names], circuits, draws=2, progress=False
    )
    sees = {name: set(known.visible[name]) for name in names}
    for number, circuit in enumerate(names):
        for other, task in enumerate(names):
            if sees[task] <= sees[circuit]:
                assert found.faithfulness[number, other] == pytest.approx(1, abs=1e-4)
            else:
                assert found.faithfulness[number, other] == pytest.approx(0, abs=1e-4)
    assert np.isnan(found.low).all()  # one prompt each


def test_refusals():
    model, task = small_model("llama"), small_task()
    circuit = score_edges(model, task, method="eap", progress=False).top(50)
    with pytest.raises(LensError, match="needs tasks and circuits, got 0 tasks and 1 circuits"):
        transfer(model, [], [circuit])
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        transfer(model, [task], [circuit], draws=0)
    with pytest.raises(LensError, match="different graphs or ablations"):
        transfer(model, [task], [circuit, replace(circuit, ablation=Ablation("zero"))])


def test_findings_are_of_each_circuit_on_every_task():
    found = Transfer(
        np.array([[0.9, 0.2], [-0.1, 1.0]]), np.array([[0.8, 0.1], [-0.2, np.nan]]), np.ones((2, 2)),
        np.array([[[0.1, 0.3], [0.4, 0.2]], [[np.nan] * 2] * 2]), np.eye(2), ("a", "a"), ("a", "b"), "m",
    )  # fmt: skip
    assert [said.kind for said in found.findings()] == ["transfer"] * 2
    assert found.findings() == (
        "The circuit of a has a faithfulness on a 0.90 [0.80, 1.00] (its heads renamed within their layers 0.20, p = 0.33); "
        "on b 0.20 [0.10, 1.00] (its heads renamed within their layers 0.30, p = 1.00).",
        "The circuit of a has a faithfulness on a -0.10 [-0.20, 1.00] (no heads that could be renamed within their layers); "
        "on b 1.00 (no heads that could be renamed within their layers).",
    )
    shown: Any = replace(
        found, renamed=np.array([[[0.1, np.nan], [0.4, 0.2]], [[np.nan] * 2] * 2])
    ).plot()
    assert shown.data[0].text[0] == ["0.90<br>renamed 0.10", "0.20<br>renamed 0.30"]
    assert shown.data[0].text[1] == ["-0.10", "1.00"]


def test_a_circuit_is_not_compared_with_itself():
    """Of one head a layer all renamed circuits are the circuit, as faithful as it."""
    known = logic_gate("sum", dtype="float64")
    graph = find_nodes(known.model).graph
    both = [f"input->a0.h{head}<v>" for head in range(graph.heads)]
    circuit = make_circuit(
        graph, [*both, *(f"a0.h{head}->m0" for head in range(graph.heads)), "m0->logits"],
        task="sum", model=known.model.name,
    )  # fmt: skip
    found = transfer(known.model, [known.task], [circuit], draws=4, progress=False)
    assert np.isnan(found.renamed).all()
    assert found.table()[["renamed", "p"]].isna().all().all()
