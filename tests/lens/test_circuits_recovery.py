"""Which methods find which known circuits, and which edges they cannot see."""

from dataclasses import replace

import numpy as np
import pytest

from lens.circuits.acdc import acdc
from lens.circuits.known import PROGRAMS, induction_transformer, logic_gate, tracr
from lens.circuits.nodes import find_nodes
from lens.circuits.recovery import recovery
from lens.circuits.scoring import score_edges

METHODS = ("eap", "eap-ig", "atp*", "acdc")


def area(known, task, truth, method, ablation):
    """AUROC of the method's scores, and the edges of the circuit that have none.

    Scores of rounding alone count as 0: they would rank the edges of a circuit above those that are
    exactly 0, without having seen anything.
    """
    if method == "acdc":
        scores = acdc(known.model, task, 0.01, ablation=ablation).scores()
    else:
        scores = score_edges(known.model, task, method=method, ablation=ablation)
    seen = np.where(np.abs(scores.per_prompt) < 1e-9, 0, scores.per_prompt)
    scores = replace(scores, per_prompt=seen)
    edges = scores.graph.find(truth)
    unseen = {edge for edge, at in zip(truth, edges, strict=True) if not scores.values[at]}
    return recovery(scores, truth).auroc, unseen


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_known_edge_is_in_the_graph(program):
    known = tracr(program)
    graph = find_nodes(known.model).graph
    assert len(graph.find(known.edges)) == len(set(known.edges)) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", ["frac_prevs", "pair_balance"])
def test_compiled_programs_are_found_by_zero_ablation(program, method):
    known = tracr(program, dtype="float64")
    found, unseen = area(known, known.task, known.edges, method, "zero")
    assert found >= 0.95
    assert not unseen


@pytest.mark.parametrize("method", METHODS)
def test_a_histogram_is_hidden_from_gradients_by_the_steps_of_its_mlp(method):
    """The MLP turns a share into a count by steps, flat nearly everywhere; runs with edges ablated see it."""
    known = tracr("hist", dtype="float64")
    found, unseen = area(known, known.task, known.edges, method, "zero")
    if method == "acdc":
        assert found >= 0.95
        return
    assert found < 0.95
    assert unseen == {"a0.h0->m0", "input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>"}


@pytest.mark.parametrize("method", METHODS)
def test_corrupt_prompts_of_equal_length_hide_what_both_have_in_common(method):
    known = tracr("hist", dtype="float64")
    found, unseen = area(known, known.task, known.edges, method, "counterfactual")
    assert found < 0.95
    assert len(unseen) >= 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["last token", "first token", "successor"])
def test_induction_is_found_where_the_softmax_is_soft(method, name):
    known = induction_transformer(4, dtype="float64")
    found, unseen = area(known, known.tasks[name], known.visible[name], method, "counterfactual")
    assert found >= 0.95
    assert not unseen


@pytest.mark.parametrize("method", METHODS)
def test_a_saturated_softmax(method):
    known = induction_transformer(30, dtype="float64")
    task = known.task
    _, unseen = area(known, task, known.visible["last token"], method, "counterfactual")
    assert unseen == ({"input->a1.h0<q>"} if method == "eap" else set())


@pytest.mark.parametrize("method", METHODS)
def test_an_or_gate_is_seen_by_no_single_ablation(method):
    known = logic_gate("or", dtype="float64")
    _, unseen = area(known, known.task, known.edges, method, "counterfactual")
    one, two = ({f"input->a0.h{head}<v>", f"a0.h{head}->m0"} for head in (0, 1))
    if method == "acdc":  # keeps the one of the two that it visits last
        assert unseen == two
    elif method == "eap-ig":  # half way the gate is open, and both are seen
        assert not unseen
    else:
        assert unseen == one | two


def test_acdc_keeps_what_several_thresholds_keep():
    known = tracr("frac_prevs", dtype="float64")
    found = acdc(known.model, known.task, [1e-4, 1e-3, 1e-2], ablation="zero")
    assert recovery(found.scores(), known.edges).auroc == 1
