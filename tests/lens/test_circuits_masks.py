"""Learned gates: their distribution, and the circuits that they find."""

import numpy as np
import pytest
import torch

import lens
from lens.circuits.checks.recovery import recovery
from lens.circuits.discovery import learn_masks
from lens.circuits.discovery._hard_concrete import draw_gates
from lens.circuits.known import induction_transformer
from lens.common.errors import LensError
from tests.lens.circuit_models import small_model, small_task
from tests.tiers import first


@pytest.fixture(scope="module")
def known():
    return induction_transformer(4, dtype="float64")


def test_gates_reach_both_ends_as_often_as_they_should():
    log_alpha = torch.tensor([-1.3, 0.0, 2.197]).double()[:, None].expand(3, 40001)
    gates = draw_gates(log_alpha, torch.Generator().manual_seed(2))
    assert gates.min() == 0
    assert gates.max() == 1
    # of Louizos et al.: P(gate > 0), and by symmetry P(gate < 1) with the opposite sign
    above = torch.sigmoid(log_alpha[:, 0] - 2 / 3 * np.log(0.1 / 1.1))
    below = torch.sigmoid(-log_alpha[:, 0] - 2 / 3 * np.log(0.1 / 1.1))
    np.testing.assert_allclose((gates > 0).double().mean(1), above, atol=0.01)
    np.testing.assert_allclose((gates < 1).double().mean(1), below, atol=0.01)
    assert above[2].item() == pytest.approx(0.978, abs=1e-3)  # published start


@pytest.mark.parametrize("name", first(["last token", "first token", "successor"], "successor"))
def test_a_price_finds_what_each_corruption_shows(known, name):
    found = learn_masks(known.model, known.tasks[name], penalty=1, steps=80)
    assert set(found.circuit().edges) == set(known.visible[name])
    assert recovery(found.scores(), known.visible[name]).auroc == 1


def test_a_target_is_honoured(known):
    found = learn_masks(known.model, known.task, sparsity=22 / 29, steps=100, baseline="zero")
    assert found.graph.n == 29
    assert found.sparsities[-1] == pytest.approx(22 / 29, abs=0.06)
    assert set(found.circuit().edges) == set(known.edges)
    assert found.table().gate[:7].isin(known.edges).all()
    assert "edge-pruning, 75.9% of the edges removed" in found.circuit().made


def test_without_a_price_all_edges_stay(known):
    found = learn_masks(known.model, known.task, penalty=0, steps=25, baseline="zero")
    assert found.circuit().n == found.graph.n


def test_nodes(known):
    found = learn_masks(
        known.model, known.task, over="nodes", penalty=0.3, steps=80, baseline="zero"
    )
    assert set(found.table().gate[:2]) == {"a0.h0", "a1.h0"}
    assert set(found.circuit().nodes) == {"input", "a0.h0", "a1.h0"}
    scores = found.scores()
    from_input = scores.graph.ends[1] == 0
    assert (scores.values[from_input] == 1).all()
    kept = scores.values[scores.graph.find(["a0.h0->a1.h0<k>", "a0.h1->a1.h0<k>"])]
    expected = found.table().set_index("gate").probability[["a0.h0", "a0.h1"]]
    np.testing.assert_allclose(kept, expected)


def test_edge_pruning_finds_the_induction_circuit_of_a_trained_model():
    """On prompts that it was not trained on, against random circuits of equal size."""
    model = lens.load("induction-2l")
    task, fresh = (lens.tasks.induction(model, 16, length=12, seed=seed) for seed in (0, 1))
    found = learn_masks(model, task, sparsity=0.9, steps=100)
    edges = found.circuit().edges
    assert len(edges) < 0.12 * found.graph.n
    assert {"input->a0.h1<v>", "a0.h1->a1.h0<k>", "a1.h0->logits"} <= set(edges)
    result = lens.circuits.evaluate(model, fresh, found.scores(), draws=5)
    assert result.cpr > result.random_cpr.max() + 0.3
    assert result.cmd < result.random_cmd.min() - 0.3


def test_the_seed_decides():
    model, task = small_model("gpt2"), small_task()

    def learned(seed):
        return learn_masks(model, task, sparsity=0.5, steps=4, seed=seed, batch_size=2, rate=0.5)

    one, same, other = learned(1), learned(1), learned(2)
    assert (one.log_alpha == same.log_alpha).all()
    assert (one.losses == same.losses).all()
    assert (one.log_alpha != other.log_alpha).any()
    assert all(p.grad is None for p in model.model.parameters())
    figure = one.plot()
    assert [line["name"] for line in figure.to_dict()["data"]] == ["loss", "expected sparsity"]
    assert "edge-pruning" in repr(one)


def test_gates_start_in_the_order_of_scores(known):
    scores = np.arange(29.0) ** 3
    found = learn_masks(known.model, known.task, penalty=0, steps=1, rate=1e-9, start=scores)
    assert found.log_alpha[[0, 14, 28]] == pytest.approx([-np.log(9), 0, np.log(9)], abs=1e-6)
    assert (np.diff(found.log_alpha) > 0).all()
    with pytest.raises(LensError, match="start must be 29 numbers"):
        learn_masks(known.model, known.task, penalty=0, start=scores[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either sparsity \\(a target\\) or penalty"),
        ({"sparsity": 0.5, "penalty": 1}, "and not both"),
        ({"sparsity": 1.0}, "sparsity must be above 0 and below 1, got 1.0"),
        ({"penalty": -1}, "penalty must be 0 or more, got -1"),
        ({"penalty": 1, "over": "heads"}, "over must be one of 'edges', 'nodes', got 'heads'"),
        ({"penalty": 1, "steps": 0}, "steps must be a positive integer, got 0"),
        ({"penalty": 1, "rate": 0}, "rate must be a positive number, got 0"),
    ],
)
def test_wrong_options_are_refused(known, options, message):
    with pytest.raises(LensError, match=message):
        learn_masks(known.model, known.task, **options)


def test_a_metric_without_gradient_is_refused(known):
    with pytest.raises(LensError, match="the metric has no gradient"):
        learn_masks(known.model, known.task.with_metric("accuracy"), penalty=1, steps=2)
