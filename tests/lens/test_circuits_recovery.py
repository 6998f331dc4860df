"""Which methods find which known circuits, and which edges they cannot see."""

from dataclasses import replace

import numpy as np
import pytest

from lens.circuits import score_edges
from lens.circuits.checks.recovery import recovery
from lens.circuits.discovery import acdc
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.known import PROGRAMS, induction_transformer, logic_gate, tracr
from lens.common.errors import LensError

METHODS = ("eap", "eap-ig", "atp*", "acdc")


def area(known, task, truth, method, ablation):
    """AUROC of the method's scores, and the edges of the circuit that have none."""
    found = recovery(scored(known, task, method, ablation), truth)
    return found.auroc, set(found.unseen)


def scored(known, task, method, ablation):
    if method == "acdc":
        return acdc(known.model, task, 0.01, baseline=ablation).scores()
    return score_edges(known.model, task, method=method, baseline=ablation)


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


INTO_COUNT = {"input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>", "a0.h0->m0"}
HIDDEN = {
    # what the first head counts goes through steps of an MLP, which are flat nearly everywhere
    ("sort_unique", "eap"): INTO_COUNT,
    ("sort_unique", "atp*"): INTO_COUNT,
    ("reverse", "eap"): {*INTO_COUNT, "input->m1"},
    ("reverse", "eap-ig"): INTO_COUNT,
    ("reverse", "atp*"): {*INTO_COUNT, "input->m1"},
    # a softmax that is saturated at every clean prompt
    ("induction_causal", "eap"): {"input->a0.h0<q>", "input->a0.h0<k>"},
    # taken out alone it changes nothing: what is left of the key, or the query, is enough
    ("sort_unique", "acdc"): {"input->a1.h0<k>"},
    ("induction_causal", "acdc"): {"input->a1.h0<k>"},
    ("reverse", "acdc"): {"input->a0.h0<q>", "input->a0.h0<k>", "input->a3.h0<q>"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", ["reverse", "sort_unique", "induction_causal"])
def test_programs_with_steps_and_sharp_attention_are_found_but_for_named_edges(program, method):
    known = tracr(program, dtype="float64")
    scores = scored(known, first_prompts(known.task, 3), method, "zero")
    found = recovery(scores, known.edges)
    hidden = HIDDEN.get((program, method), set())
    assert set(found.unseen) == hidden
    assert recovery(scores, set(known.edges) - hidden).auroc >= 0.95


def first_prompts(task, count):
    return replace(
        task,
        clean=task.clean[:count],
        corrupt=task.corrupt_or_refuse()[:count],
        positions=task.positions[:count],
        correct=task.correct[:count],
        wrong=task.wrong[:count],
    )


@pytest.mark.parametrize("program", ["sort_unique", "induction_causal"])
def test_what_acdc_misses_is_less_than_its_threshold_alone(program):
    known = tracr(program, dtype="float64")
    exact = scored(known, first_prompts(known.task, 3), "exact", "zero")
    missed = exact.graph.find(HIDDEN[program, "acdc"])
    assert np.abs(exact.values[missed]).max() < 0.01
    others = exact.graph.find(set(known.edges) - HIDDEN[program, "acdc"])
    assert exact.values[others].min() > 0.01


def test_rounding_finds_nothing():
    known = induction_transformer(4, dtype="float64")
    scores = score_edges(known.model, known.task, method="exact")
    noise = np.random.default_rng(0).normal(size=scores.per_prompt.shape) * 1e-12
    hidden = scores.graph.find(known.visible["last token"])
    values = np.where(np.isin(np.arange(scores.graph.n), hidden), 0, noise)
    values[0, scores.graph.find(["input->a1.h0<q>"])] = 1
    found = recovery(replace(scores, per_prompt=values), known.visible["last token"])
    assert found.unseen == ("a1.h0->logits",)
    assert found.auroc == pytest.approx(0.75)  # one above all, one tied with the rest
    strict = recovery(replace(scores, per_prompt=values), known.visible["last token"], rounding=0)
    assert strict.auroc < 0.75  # last of all
    with pytest.raises(LensError, match="rounding must be a share of 0 or more and below 1, got 1"):
        recovery(scores, known.edges, rounding=1)


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
    found = acdc(known.model, known.task, [1e-4, 1e-3, 1e-2], baseline="zero")
    assert recovery(found.scores(), known.edges).auroc == 1
