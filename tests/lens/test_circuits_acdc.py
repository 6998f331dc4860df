"""ACDC: the batched search equals one edge at a time, and finds circuits that are known."""

import numpy as np
import pytest
import torch

from lens.circuits.checks.recovery import recovery
from lens.circuits.discovery import acdc
from lens.circuits.discovery._acdc import visiting_order
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.references import References
from lens.circuits.known import induction_transformer, logic_gate
from lens.common.errors import LensError
from tests.lens.circuit_models import small_model, small_task
from tests.tiers import later


def one_at_a_time(model, task, threshold, *, order, baseline="counterfactual", kv="head", size=abs):
    """Edges kept, as ACDC is written down: one run per edge, nodes that nobody reads left out."""
    nodes = find_nodes(model, kv=kv)
    graph = nodes.graph
    rows = torch.arange(task.n)
    reference = References(nodes, task, Ablation(baseline, kv=kv)).of(rows)
    kept = dict.fromkeys(zip(*graph.ends, strict=True), True)

    def loss():
        mask = torch.zeros(1, *graph.allowed.shape, dtype=torch.float64)
        for (reader, writer), stays in kept.items():
            mask[0, reader, writer] = 0 if stays else 1
        with torch.no_grad():
            logits = masked_logits(nodes, task.clean, reference, mask)[0]
        return -task.sign * task.measure(logits, rows).mean().item()

    current = loss()
    for reader in reversed(range(len(graph.readers))):
        writers = [w for r, w in kept if r == reader]
        for writer in reversed(writers) if order == "reverse" else writers:
            fed = graph.feeds[reader]
            alone = fed and not any(kept[r, w] for r, w in kept if w in fed)
            kept[reader, writer] = False
            if alone:
                continue
            changed = loss()
            if size(changed - current) < threshold:
                current = changed
            else:
                kept[reader, writer] = True
    return np.array(list(kept.values())), current


@pytest.mark.parametrize(
    ("kind", "threshold", "order", "absolute"),
    [
        ("gpt2", 0.02, "reverse", False),
        ("gpt_neox", 0.1, "forward", True),
        later("attention_only", 0.1, "reverse", True),
    ],
)
def test_batched_search_is_one_edge_at_a_time(kind, threshold, order, absolute):
    model, task = small_model(kind), small_task(rows=3)
    found = acdc(model, task, threshold, order=order, absolute=absolute, batch_size=2)
    size = abs if absolute else float
    kept, loss = one_at_a_time(model, task, threshold, order=order, size=size)
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(found.kept[0], kept)
    assert found.loss[0] == pytest.approx(loss, rel=1e-10)
    assert found.runs[0] <= found.graph.n


def test_shared_keys_and_kl():
    model = small_model("llama")
    task = small_task(rows=2).with_kl(model)
    found = acdc(model, task, 0.05, kv="group", baseline="zero")
    kept, loss = one_at_a_time(
        model, task, 0.05, order="reverse", kv="group", baseline="zero", size=float
    )
    np.testing.assert_array_equal(found.kept[0], kept)
    assert found.loss[0] == pytest.approx(loss, rel=1e-10)
    assert found.whole == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("beta", [4, 30])
def test_what_each_corruption_of_the_induction_transformer_shows(beta):
    known = induction_transformer(beta, dtype="float64")
    union = set()
    for name, task in known.tasks.items():
        edges = acdc(known.model, task, 0.05).circuit().edges
        assert set(edges) == set(known.visible[name])
        union |= set(edges)
    assert set(known.edges) - union == {"input->a0.h0<q>", "input->a0.h0<k>"}
    zero = acdc(known.model, known.task, 0.05, baseline="zero").circuit()
    assert set(zero.edges) == set(known.edges)


def test_threshold_at_which_each_edge_goes():
    known = induction_transformer(4, dtype="float64")
    found = acdc(known.model, known.task, [0.5, 0.01, 3.0], baseline="zero")
    assert found.thresholds == (0.01, 0.5, 3.0)
    assert (np.diff(found.kept.sum(1)) <= 0).all()
    scores = found.scores()
    expected = [
        max((t for t in found.thresholds if edge in found.circuit(t).edges), default=0)
        for edge in scores.graph.edges
    ]
    assert scores.values.tolist() == expected
    assert 0 < max(expected) < 3
    assert recovery(scores, known.edges).auroc == 1
    table = found.table()
    assert list(table.threshold) == [0.01, 0.5, 3.0]
    assert list(table.edges) == [found.circuit(limit).n for limit in found.thresholds]
    with pytest.raises(LensError, match=r"with the threshold None; choose one of 0.01, 0.5, 3"):
        found.circuit()
    drawn = found.plot().data[0]
    assert list(drawn["x"]) == list(table.edges)
    assert "3 thresholds from 0.01 to 3 keep 7 to" in repr(found)


def test_gates():
    found = acdc(*_gate("and"), 0.1)
    assert set(found.circuit().edges) == set(logic_gate("and").edges)
    kept = {
        order: set(acdc(*_gate("or"), 0.1, order=order).circuit().edges)
        for order in ("reverse", "forward")
    }
    # of two edges that stand in for each other the one visited last is kept
    assert kept["reverse"] == {"m0->logits", "a0.h0->m0", "input->a0.h0<v>"}
    assert kept["forward"] == {"m0->logits", "a0.h1->m0", "input->a0.h1<v>"}


def _gate(name):
    known = logic_gate(name, dtype="float64")
    return known.model, known.task


def test_an_edge_whose_removal_helps_goes_unless_sizes_count():
    known = induction_transformer(4, dtype="float64")
    task = known.task
    turned = type(task)(**{**vars(task), "correct": task.wrong, "wrong": task.correct})
    assert acdc(known.model, turned, 0.05).circuit().n == 0
    assert set(acdc(known.model, turned, 0.05, absolute=True).circuit().edges) == set(
        known.visible["last token"]
    )


def test_random_orders_are_topological_and_repeat():
    graph = Graph(3, 4, 2)
    one, same, other = (visiting_order(graph, "random", seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    for order in (one, visiting_order(graph, "forward"), visiting_order(graph, "reverse")):
        assert sorted(order) == list(range(graph.n))
        place = np.argsort(order)
        reader, writer = graph.ends
        for node in range(1, len(graph.writers)):
            into = [number for number, fed in enumerate(graph.feeds) if node in fed]
            assert place[writer == node].max() < place[np.isin(reader, into)].min()


@pytest.mark.parametrize(
    ("thresholds", "options", "message"),
    [
        ([], {}, "thresholds must be finite numbers of 0 or more, got \\[\\]"),
        (-1.0, {}, "got -1.0"),
        (0.1, {"order": "up"}, "order must be one of 'reverse', 'forward', 'random', got 'up'"),
        (0.1, {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        (0.1, {"baseline": "noise"}, "baseline must be one of .*got 'noise'"),
    ],
)
def test_wrong_options_are_refused(thresholds, options, message):
    with pytest.raises(LensError, match=message):
        acdc(small_model("gpt2"), small_task(), thresholds, **options)


def test_a_metric_that_is_not_a_number_is_refused():
    model = small_model("gpt2")
    find_nodes(model)  # sees nothing wrong yet
    with torch.no_grad():
        model.model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(LensError, match="the metric of the whole model is NaN or infinite"):
        acdc(model, small_task(), 0.1)
