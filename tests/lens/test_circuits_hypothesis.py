"""Hypothesis tests: published values, rates under the null, and circuits that are known."""

from itertools import pairwise

import numpy as np
import pytest

from lens.circuits import run_circuit
from lens.circuits.checks import (
    equivalence,
    independence,
    minimality_test,
    necessity,
    sufficiency,
)
from lens.circuits.checks._hypothesis import _tail
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import make_circuit
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.selection import random_path
from lens.circuits.known import induction_transformer
from lens.common.errors import LensError


@pytest.fixture(scope="module")
def known():
    return induction_transformer(8, dtype="float64")


def circuit_of(known, edges):
    graph = find_nodes(known.model).graph
    return make_circuit(graph, edges, ablation=Ablation("counterfactual"))


@pytest.mark.parametrize(("better", "p"), [(60, 0.543), (65, 0.179), (70, 0.0248)])
def test_equivalence_has_the_published_values(better, p):
    model = np.r_[np.ones(better), -np.ones(100 - better)]
    found = equivalence(model, np.zeros(100))
    assert found.p == pytest.approx(p, abs=6e-4)
    assert found.statistic == better / 100


def test_the_binomial_tail_has_the_published_value():
    assert _tail(96, 100) == pytest.approx(0.0237, abs=5e-5)
    assert _tail(0, 100) == 1
    assert _tail(28, 28) > 0.05 > _tail(29, 29)


def test_equal_prompts_count_half():
    found = equivalence(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 5]))
    assert found.statistic == pytest.approx(1.5 / 4)
    assert equivalence(np.ones(10), np.ones(10)).p == pytest.approx(1)


def test_equivalence_rejects_a_true_null_no_more_often_than_said():
    draw = np.random.default_rng(0)
    values = draw.normal(size=(400, 60))
    rejected = np.mean([equivalence(row, np.zeros(60)).p < 0.05 for row in values])
    assert rejected < 0.05


def naive_hsic(x, y):
    """tr(K H L H) / n^2, with the centring matrix."""
    n = len(x)
    kernels = []
    for values in (x, y):
        apart = np.abs(values[:, None] - values)
        width = np.median(apart[apart > 0])
        kernels.append(np.exp(-(apart**2) / (2 * width**2)))
    h = np.eye(n) - 1 / n
    return np.trace(kernels[0] @ h @ kernels[1] @ h) / n**2


def test_independence_is_the_trace_and_sees_what_correlation_does_not():
    draw = np.random.default_rng(1)
    x = draw.normal(size=53)
    y = x**2 + 0.1 * draw.normal(size=53)
    found = independence(x, y, permutations=199)
    assert found.statistic == pytest.approx(naive_hsic(x, y), rel=1e-12)
    assert found.p == pytest.approx(1 / 200)


def test_independence_rejects_a_true_null_as_often_as_said():
    draw = np.random.default_rng(2)
    p = [independence(*draw.normal(size=(2, 23)), permutations=49, seed=n).p for n in range(300)]
    assert 0.02 < np.mean(np.array(p) <= 0.06) < 0.11
    assert 0.4 < np.mean(p) < 0.6


@pytest.mark.parametrize("test", [equivalence, independence])
@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(test, lost):
    """NaN was a prompt on which the model is not better, and a permutation that fell short: p was 0.001."""
    whole, holed = np.arange(4.0), np.array([1, lost, 3, 4])
    for given in ((holed, whole), (whole, holed)):
        with pytest.raises(LensError, match=f"{test.__name__} .* 1 of 4 are not, .* prompt 1;"):
            test(*given)


def test_random_paths_go_from_the_input_to_the_logits():
    graph, draw = Graph(3, 4, 2, kv="group"), np.random.default_rng(0)
    reader, writer = graph.ends
    for _ in range(40):
        path = random_path(graph, draw)
        assert reader[path[0]] == len(graph.readers) - 1
        assert writer[path[-1]] == 0
        for above, below in pairwise(path):
            assert writer[above] in graph.feeds[reader[below]]


def test_the_true_circuit_is_sufficient_and_necessary_and_a_wrong_one_is_not(known):
    right = circuit_of(known, known.edges)
    wrong = circuit_of(known, ["input->a0.h1<v>", "a0.h1->a1.h1<v>", "a1.h1->logits"])
    for test in (sufficiency, necessity):
        good = test(known.model, known.task, right, draws=40, progress=False)
        bad = test(known.model, known.task, wrong, draws=40, progress=False)
        assert good.statistic > bad.statistic, test
        assert bad.p > 0.9
    few = circuit_of(known, ["input->a1.h0<q>", "a1.h0->logits"])
    found = sufficiency(known.model, known.task, few, draws=60, seed=1, progress=False)
    assert found.statistic == 1
    assert found.p == pytest.approx(0.9**60)


def test_edges_that_do_the_task_are_told_from_added_ones(known):
    decoy = ("input->a0.h1<v>", "a0.h1->a1.h1<v>", "a1.h1->logits")
    circuit = circuit_of(known, ("input->a1.h0<q>", "a1.h0->logits", *decoy))
    found = minimality_test(known.model, known.task, circuit, draws=60, progress=False)
    assert found.needed() == ("input->a1.h0<q>", "a1.h0->logits")
    whole = run_circuit(known.model, known.task, circuit, progress=False)
    change = abs(whole.metric[0] - whole.empty).mean()
    table = found.table().set_index("edge")
    assert table.loc["a1.h0->logits", "change"] == pytest.approx(change, rel=1e-9)
    assert table.loc[decoy[0], "change"] == pytest.approx(0, abs=1e-12)
    assert len(found.null) == 60
    one = minimality_test(
        known.model, known.task, circuit, edges=decoy[:1], draws=30, progress=False
    )
    assert one.edges == decoy[:1]
    assert one.p[0] > 0.9


def test_what_cannot_be_tested_is_refused(known):
    with pytest.raises(LensError, match="equivalence compares one number per prompt"):
        equivalence(np.ones(3), np.ones(4))
    with pytest.raises(LensError, match=r"epsilon must be 0 or more and below 0\.5, got 0\.7"):
        equivalence(np.ones(3), np.ones(3), epsilon=0.7)
    with pytest.raises(LensError, match="at least 4 prompts of both"):
        independence(np.ones(3), np.ones(3))
    with pytest.raises(LensError, match="all numbers are equal"):
        independence(np.ones(5), np.arange(5.0))
    circuit = circuit_of(known, known.edges)
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        sufficiency(known.model, known.task, circuit, draws=0)
    with pytest.raises(LensError, match="edges must be edges of the circuit"):
        minimality_test(known.model, known.task, circuit, edges=("a1.h1->logits",))
    whole = make_circuit(circuit.graph, circuit.graph.edges)
    with pytest.raises(LensError, match="the circuit has every edge"):
        minimality_test(known.model, known.task, whole)
