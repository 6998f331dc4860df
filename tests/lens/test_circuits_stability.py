"""Stability: circuits of drawn prompts, overlaps by hand, and rounding."""

from dataclasses import replace

import numpy as np
import pytest

from lens.circuits import exports, score_edges
from lens.circuits.checks import jaccard, noise_floor, stability
from lens.circuits.checks._consensus import consensus
from lens.circuits.discovery import learn_masks
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.circuit import make_circuit
from lens.circuits.graph.edge_scores import EdgeScores
from lens.circuits.graph.graph import Graph
from lens.circuits.scores import positions
from lens.circuits.scores.methods import EapIg, Hybrid
from lens.common.errors import LensError
from tests.lens.circuit_models import small_model, small_task

GRAPH = Graph(2, 3, 3)


def scored(values):
    return EdgeScores(GRAPH, np.asarray(values, float), "eap", Ablation(), "m", "t", "toy")


def test_overlaps_by_hand():
    names = GRAPH.edges
    some = [make_circuit(GRAPH, part) for part in (names[:4], names[2:6], names[:4])]
    found = jaccard(some)
    assert found.values == pytest.approx([2 / 6, 1, 2 / 6])
    assert found.mean == pytest.approx((1 + 4 / 6) / 3)
    assert found.frequency[:7] == pytest.approx([2 / 3, 2 / 3, 1, 1, 1 / 3, 1 / 3, 0])
    share = 4 / GRAPH.n
    assert found.chance == pytest.approx(share / (2 - share))
    assert jaccard([make_circuit(GRAPH, [])] * 2).mean == 1
    assert list(found.table()["of"]) == ["edges", "nodes"]
    assert "3 circuits: Jaccard index of edges 0.56 (0.33 to 1.00" in repr(found)


@pytest.mark.parametrize("parts", [(5, 5), (4, 40)])
def test_the_chance_level_is_what_random_circuits_have(parts):
    """Also of circuits of two sizes: that of their mean size is far above."""
    draw = np.random.default_rng(1)
    graph = Graph(4, 6, 6)
    circuits = []
    for number in range(60):
        names = draw.choice(graph.edges, graph.n // parts[number % 2], replace=False)
        circuits.append(make_circuit(graph, [str(name) for name in names]))
    found = jaccard(circuits)
    assert found.values.mean() == pytest.approx(found.chance, rel=0.03)


def test_prompts_that_agree_are_stable_and_noise_is_not():
    draw = np.random.default_rng(0)
    same = np.tile(draw.normal(size=GRAPH.n), (12, 1))
    assert stability(scored(same), 15, method="greedy").mean == 1
    noise = stability(scored(draw.normal(size=(12, GRAPH.n))), 15, method="greedy", resamples=6)
    assert noise.mean < 0.7
    assert len(noise.values) == 15
    assert (noise.what, noise.circuits) == ("resamples", 6)
    again = stability(
        scored(same + 3 * draw.normal(size=(12, GRAPH.n))), 15, method="greedy", resamples=6, seed=4
    )
    assert again.mean < 1


def test_the_ranking_is_that_of_the_circuit():
    """The path by m1 helps, that by m0 harms some prompts: by size it comes and goes, with sign never."""
    values = np.zeros((12, GRAPH.n))
    values[:, GRAPH.find(["input->m1", "m1->logits"])] = 1
    values[::2, GRAPH.find(["input->m0", "m0->logits"])] = -2.05
    assert stability(scored(values), 2, absolute=False).mean == 1
    assert stability(scored(values), 2).mean < 1


def test_resamples_are_those_of_the_prompts():
    values = np.zeros((40, GRAPH.n))
    values[:, GRAPH.find(["input->logits"])] = 1
    rare = GRAPH.find(["input->m1", "m1->logits"])
    values[:20, rare], values[20:, rare] = 1, -1  # they cancel in half of the draws
    found = stability(scored(values), 3, resamples=60)
    frequency = found.frequency[GRAPH.find(["input->logits"])[0]]
    assert frequency == 1
    assert found.mean < 1 or found.frequency[rare].max() in (0, 1)


def test_scores_that_are_computed_again_are_the_same_but_for_what_was_planted():
    model, task = small_model("attention_only"), small_task()
    scores = score_edges(model, task, method=EapIg(2), progress=False)
    found = noise_floor(model, task, scores, progress=False)
    assert found.relative < 1e-12
    assert found.largest < 1e-12
    assert found.same == 1
    assert found.dtype == "float64"
    off = scores.per_prompt.copy()
    off[:, 7] += 0.5
    planted = noise_floor(model, task, replace(scores, per_prompt=off), progress=False)
    assert planted.largest == pytest.approx(0.5)
    assert planted.relative == pytest.approx(0.5 / np.linalg.norm(off.mean(0)))
    assert planted.below == pytest.approx((np.abs(off.mean(0)) <= planted.largest).mean())


def test_scores_that_cannot_be_made_again_have_no_noise_floor(tmp_path):
    """Made again by another method, or with other steps, they differed by what reads as rounding."""
    model, task = small_model("attention_only"), small_task()
    scores = score_edges(model, task, method=EapIg(2, "left"), progress=False)
    hybrid = score_edges(model, task, method=Hybrid(("eap-ig", "exact")), progress=False)
    with pytest.raises(LensError, match="by 'hybrid' and do not say the methods"):
        noise_floor(model, task, hybrid)
    with pytest.raises(LensError, match="by 'eap-ig' and do not say its steps"):
        noise_floor(model, task, replace(scores, steps=None))
    with pytest.raises(LensError, match="give the model that was scored"):
        noise_floor(model, task, replace(scores, model="other"))
    other = scored(np.ones((5, GRAPH.n)))
    with pytest.raises(LensError, match="give the model that was scored"):
        noise_floor(model, task, replace(other, task=task.name, model=model.name))
    exports.to_mib(scores, tmp_path / "importances.json")
    read = exports.from_mib(tmp_path / "importances.json")
    again = noise_floor(model, task, replace(read, per_prompt=scores.per_prompt), progress=False)
    assert again.relative < 1e-12
    places = positions(model, task, "each", method=EapIg(2, "left"), progress=False).edges()
    assert (places.steps, places.rule) == (2, "left")
    assert noise_floor(model, task, places, progress=False).relative < 1e-9


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(LensError, match="stability needs scores of at least 2 prompts, got 1"):
        stability(scored(np.ones((1, GRAPH.n))), 3)
    with pytest.raises(LensError, match="resamples must be an integer of at least 2, got 1"):
        stability(scored(np.ones((3, GRAPH.n))), 3, resamples=1)
    one = make_circuit(GRAPH, [])
    with pytest.raises(LensError, match="overlaps need at least 2 circuits, got 1"):
        jaccard([one])
    with pytest.raises(LensError, match="the circuits are of different graphs"):
        jaccard([one, make_circuit(Graph(1, 1, 1), [])])
    model, task = small_model("attention_only"), small_task()
    with pytest.raises(LensError, match="the scores are of 2 prompts of 't', and the task is 5"):
        noise_floor(model, task, scored(np.ones((2, GRAPH.n))))


def test_the_core_is_in_every_view_and_more_views_never_grow_it():
    names = GRAPH.edges
    views = [make_circuit(GRAPH, part) for part in (names[:5], names[2:7], names[1:4])]
    two, three = consensus(views[:2]), consensus(views)
    assert two.core.edges == names[2:5]
    assert three.core.edges == names[2:4]
    assert three.union.edges == names[:7]
    table = three.table().set_index("edge")
    assert table.loc[names[2], ["share", "part"]].tolist() == [1.0, "core"]
    assert table.loc[names[1], "share"] == pytest.approx(2 / 3)
    assert [one.kind for one in three.findings()] == ["core", "chance"]
    assert three.by_chance == pytest.approx(5 * 5 * 3 / GRAPH.n**2)
    assert three.findings()[0].startswith(
        "All 3 views keep 2 of the 7 edges that any keeps; of random circuits of these sizes "
    )
    assert "(Jaccard index, pairs 33% to 60%; random ones of these sizes " in three.findings()[1]


def test_a_core_says_of_what_it_is():
    names = GRAPH.edges
    zero, mean = (
        make_circuit(GRAPH, names[:5], ablation=Ablation(word), task=word, model="toy")
        for word in ("zero", "mean")
    )
    core = consensus([zero, mean]).core
    assert core.made == "core of 2 views by zero and mean ablation, run by zero"
    assert core.task == "zero and mean"
    assert consensus([zero, zero]).union.made == "union of 2 views"
    with pytest.raises(LensError, match="the circuits are of several models"):
        consensus([zero, replace(mean, model="other")])


def test_edges_whose_sign_hangs_on_the_prompts_are_left_out():
    """Edge 0 is largest on average and has either sign; edges 1 and 2 are sure."""
    draw = np.random.default_rng(0)
    values = np.zeros((16, GRAPH.n))
    values[:, 0] = 0.5 + 30 * draw.normal(size=16)
    values[:, 1], values[:, 2] = 1, -2 + 0.1 * draw.normal(size=16)
    values[0, 0] += 16 * (3 - values[:, 0].mean())
    found = scored(values)
    assert found.top(1, prune=False).edges == GRAPH.edges[:1]
    assert found.top(1, method="bootstrap", prune=False).edges == GRAPH.edges[2:3]
    assert found.top(1, method="bootstrap", absolute=False, prune=False).edges == GRAPH.edges[1:2]
    assert found.top(GRAPH.n, method="bootstrap", prune=False).n == 2
    assert scored(values[:1]).top(3, method="bootstrap", prune=False).n == 3


def test_a_hybrid_is_the_mean_at_equal_scale():
    model, task = small_model("attention_only"), small_task()
    parts = [score_edges(model, task, method=one, progress=False) for one in ("eap-ig", "eap")]
    found = score_edges(model, task, method=Hybrid(("eap-ig", "eap")), progress=False)
    sizes = [np.sqrt((one.values**2).mean()) for one in parts]
    expected = (parts[0].values / sizes[0] + parts[1].values / sizes[1]) / 2 * sizes[0]
    assert found.values == pytest.approx(expected, abs=1e-9)
    assert (found.method, found.residual) == ("hybrid", None)
    pruning = Hybrid(("eap-ig", "eap"), pruning=0.5, steps=2)
    learned = learn_masks(model, task, sparsity=0.5, steps=2, start=np.abs(parts[0].values))
    signed = np.sign(parts[0].values) * learned.probabilities
    expected = (2 * expected / sizes[0] + signed / np.sqrt((signed**2).mean())) / 3 * sizes[0]
    more = score_edges(model, task, method=pruning, progress=False)
    assert more.values == pytest.approx(expected, abs=1e-9)
    with pytest.raises(LensError, match="at least two methods"):
        Hybrid(("eap",))
    with pytest.raises(LensError, match="pruning must lie between 0 and 1"):
        Hybrid(pruning=1.5)
    with pytest.raises(LensError, match="plain methods"):
        Hybrid(("eap", "hybrid"))
