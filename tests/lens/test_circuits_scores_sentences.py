"""What scores of edges, gates, heads and searched circuits say, word by word, and where it would be the opposite."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import lens
from lens.circuits.checks._hypothesis import EdgeTests
from lens.circuits.discovery._acdc import Acdc
from lens.circuits.discovery._hard_concrete import LearnedMasks
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.scores._flow import FlowRoutes, flow_routes
from lens.circuits.scores._hisp import GateScores
from lens.common.errors import LensError
from lens.common.results import of_kind
from tests.lens.circuit_models import small_model, small_task
from tests.lens.test_sentences import at_places

GRAPH = Graph(1, 1, 1, mlps=False)  # input to q, k, v and logits, the head to logits: 5 edges


def one(result, kind):
    (said,) = of_kind(result.findings(), kind)
    return said.text


@pytest.fixture
def edges():
    """Two edges that are sure, one of either sign, one of rounding alone, one of nothing."""
    values = np.zeros((4, 5))
    values[:, 0], values[:, 1] = [-2.0, -2.2, -1.8, -2.0], 0.5
    values[:, 2], values[:, 3] = [1, -1, 1, -1], 1e-9
    return EdgeScores(
        GRAPH, values, "eap-ig", Ablation(), "loss", "made", "toy", 5, "midpoint", -0.3, 2.0
    )


def test_edges(edges):
    names = [name.replace("->", " to ") for name in GRAPH.edges]
    assert [said.kind for said in edges.findings()] == ["largest", "chance", "integral"]
    assert one(edges, "largest") == (
        f"On made (4 prompts) eap-ig scores the edges {names[0]} -2 [-2.52, -1.48]; {names[1]} +0.5 [+0.5, +0.5]; {names[3]} "
        f"+1e-09 [+1e-09, +1e-09]; {names[2]} +0 [-3.44, +3.44] highest by size (intervals as of the largest of all), in units "
        "of loss; positive: the task goes worse without the edge. The median size of 5 edges is 1e-09."
    )
    assert one(edges, "chance") == (
        "2 of 5 edges have a 95 % interval that leaves out 0 (0.3 by chance)."
    )  # that of rounding is no third
    assert one(edges, "integral") == (
        "The edges from the input sum to 1.7 where they should to 2: the integral of 5 steps is 15% off, so more steps would "
        "help."
    )
    near = replace(edges, residual=0.02)
    assert one(near, "integral").endswith("is 1% off.")
    single = replace(edges, per_prompt=edges.per_prompt[:1], residual=None)
    (said,) = single.findings()
    assert "(1 prompt) eap-ig scores the edges" in said
    assert "[" not in said.replace("[2", "")
    assert "intervals" not in said
    gates = replace(edges, method="edge-pruning", residual=None)
    assert "the probability that its gate is open. The median" in one(gates, "largest")
    files = one(replace(single, method="imported"), "largest")
    assert ", in the units of their file, which does not say what the sign means. The" in files
    assert replace(edges, per_prompt=np.full((2, 5), np.nan)).findings() == ()


def test_sizes_of_edges_have_no_sign_and_none_is_0_by_chance():
    values = np.array([[2.0, 1, 0, 0, 0], [4.0, 1, 1.8, 0, 0]])
    found = EdgeScores(GRAPH, values, "atp*-grad-drop", Ablation(), "loss", "made", "toy")
    assert found.findings() == (
        "On made (2 prompts) atp*-grad-drop scores the edges input to a0.h0<q> 3 [0, 48.9]; input to a0.h0<k> 1 "
        "[1, 1]; input to a0.h0<v> 0.9 [0, 42.2]; input to logits 0 [0, 0] highest by size (intervals as of the "
        "largest of all), mean sizes in units of loss, without a sign. The median size of 5 edges is 0.9.",
    )


def test_sentences_of_edges_draw_the_prompts_by_the_seed_that_is_given(monkeypatch):
    seeds = []
    table = EdgeScores.table
    monkeypatch.setattr(
        EdgeScores, "table", lambda self, **given: seeds.append(given) or table(self, **given)
    )
    values = np.random.default_rng(0).normal(0, 1, (6, 5))
    found = EdgeScores(GRAPH, values, "eap", Ablation(), "loss", "made", "toy")
    assert found.findings(seed=3) != found.findings(seed=4)
    assert seeds == [{"count": 5, "seed": 3}, {"count": 5, "seed": 4}]
    replace(found, method="atp*-grad-drop", per_prompt=np.abs(values)).findings()
    assert seeds[-1] == {"count": 4, "seed": 0}  # intervals of those that it names


def test_edge_tests():
    null = np.linspace(0, 0.1, 60)
    found = EdgeTests(("a->b", "c->d"), np.array([0.05, 0.7]), null, np.array([0.9, 0.001]))
    assert found.findings() == (
        "1 of 2 edges of the circuit are told from edges of random paths that were added to it (p at most 0.05 / 2); most "
        "does c->d: it changes the metric by 0.7, 90 of 100 added ones by at most 0.09 (60 draws).",
    )
    few = replace(found, null=null[:20], p=np.array([0.9, 0.12]))
    assert one(few, "told").startswith("0 of 2 edges")
    assert one(few, "draws").startswith("With 20 draws p is at least 0.12 and above 0.05 / 2")


@pytest.fixture
def acdc():
    kept = np.array([[True, True, True, False, False], [True, False, False, False, False]])
    return Acdc(
        GRAPH, (0.1, 0.5), kept, np.array([1.2, 3.0]), 1.0, np.array([5, 5]), "reverse", 0, False,
        Ablation(), "loss", "made", "toy",
    )  # fmt: skip


def test_acdc(acdc):
    assert acdc.findings() == (
        "On made threshold 0.1 keeps 3 of 5 edges, with a loss of 1.2; threshold 0.5 keeps 1 of 5 edges, with a loss of 3 "
        "(loss, less is better; the whole model's is 1, both on the prompts that edges were tested on). Edges were visited "
        "in reverse order; of two that stand in for each other one is kept.",
    )
    alone = replace(acdc, thresholds=(0.1,), kept=acdc.kept[:1], loss=acdc.loss[:1])
    assert "0.5" not in one(alone, "circuits")
    turned = replace(acdc, metric="logit_difference", loss=np.array([-2.0, -1.0]), whole=-3.0)
    assert "a loss of -1 (logit_difference turned so that less is better; the whole" in one(
        turned, "circuits"
    )


def test_acdc_has_no_score_of_the_threshold_0(acdc):
    """It is 0, as that of edges that no threshold keeps."""
    assert acdc.scores().values.tolist() == [0.5, 0.1, 0.1, 0, 0]
    with pytest.raises(LensError, match="2 edges are kept by the threshold 0 alone"):
        replace(acdc, thresholds=(0.0, 0.5)).scores()
    both = replace(acdc, thresholds=(0.0, 0.5), kept=acdc.kept[[1, 1]])
    assert both.scores().values.tolist() == [0.5, 0, 0, 0, 0]


def test_learned_masks():
    found = LearnedMasks(
        GRAPH, "edges", np.array([5.0, 5, -9, -9, -1.6]), np.ones(30), np.ones(30), 0.6, None, 3, Ablation(),
        "loss", "made", "toy",
    )  # fmt: skip
    assert found.findings() == (
        "Of 5 gates on edges 2 are open with a probability of at least 0.9 and 1 undecided (0.1 to 0.9) after 30 steps; 50.0% "
        "of them are expected to be 0 (60.0% asked for). Of one seed (3): others may open other gates.",
    )
    priced = replace(found, sparsity=None, penalty=0.5, log_alpha=np.full(5, 9.0))
    assert "5 are open with a probability of at least 0.9 and 0 undecided" in one(priced, "gates")
    assert "0.0% of them are expected to be 0 (a penalty of 0.5)" in one(priced, "gates")


@pytest.fixture
def gates():
    values = np.array([[4.0, 1, 0], [2.0, 1, 0]])
    return GateScores(GRAPH, values, False, Ablation(), "loss", "made", "toy")


def test_gates(gates):
    names = GRAPH.readers
    assert gates.findings() == (
        f"On made (2 prompts) the metric changes fastest with the gates of {names[0]} 3 [0, 30.6], {names[1]} 1 [1, 1], "
        f"{names[2]} 0 [0, 0], in units of loss and without a sign (intervals as of the largest of all); the median of 3 gates "
        "has 1.",
    )
    single = replace(gates, per_prompt=gates.per_prompt[:1, ::-1], normalized=True)
    (said,) = single.findings()
    assert f"with the gates of {names[2]} 0.97, {names[1]}" in said
    assert "normalised by layer and without a sign; the median" in said


def test_numbers_and_scores_that_are_none_are_refused(gates, edges):
    """They ended in raw errors, were ranked, or dropped a row."""
    for count in (2.5, "2", -1, True):
        with pytest.raises(LensError, match="top takes 0 to 3 nodes, got"):
            gates.top(count)
    with pytest.raises(LensError, match="1 nodes have no score"):
        replace(gates, per_prompt=np.array([[1.0, np.nan, 2]])).top(1)
    for count in (-1, 0):
        with pytest.raises(LensError, match=f"count must be a positive integer, got {count}"):
            edges.table(count=count)
        with pytest.raises(LensError, match=f"count must be a positive integer, got {count}"):
            at_places().table(count)
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 1, length=5)
    with pytest.raises(LensError, match="'induction' has one pair of prompts, and codes need 2"):
        lens.circuits.scores.codes(model, task)


def test_routes():
    columns = pd.Index(["prompt", "layer", "sum", "part", "query", "key", "importance"])
    rows = [(0, 0, "attention", "L0H1", 3, 2, 0.5), (1, 0, "attention", "residual", 3, 3, 0.9)]
    found = FlowRoutes(
        pd.DataFrame(rows, columns=columns), np.array([[[0.0, 0], [0.5, 0], [0, 0]]]), (("a",), ("b",)), 0.04, "made", "toy"
    )  # fmt: skip
    assert one(found, "routes") == (
        "Routes to the answers of made (2 prompts, 1 edge a prompt from a share of 0.04 on) pass most through L0H1 0.25 "
        "[0, 7.1] in 50% of the prompts, the median head 0 (summed importance; intervals as of the largest of all)."
    )
    nothing = replace(found, per_prompt=found.per_prompt * 0)
    assert nothing.findings() == (
        "No head is on the routes to the answers of made (2 prompts, 1 edge a prompt from a share of 0.04 on).",
    )
    once = replace(found, per_prompt=found.per_prompt[..., :1], tokens=(("a",),))
    assert one(once, "routes") == (
        "Routes to the answers of made (1 prompt, 2 edges a prompt from a share of 0.04 on) pass most through L0H1 0.5, the "
        "median head 0 (summed importance)."
    )


def test_a_route_that_ends_above_the_first_layer_ends():
    """Of a state whose parts are all small nothing is followed: it was the largest of no places."""
    found = flow_routes(small_model("gpt_neox"), small_task(), threshold=0.3, progress=False)
    assert len(found.edges)
    assert (found.edges["importance"] >= 0.3).all()
