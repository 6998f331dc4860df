"""Circuits that are known exactly: what every causal measure must find, and what which one cannot see."""

import numpy as np
import pytest

import lens
from lens.circuits.known import induction_transformer, logic_gate, tracr
from lens.heads import agreement, importance
from lens.heads.pruning import ablate
from lens.stats.intervals import columns
from lens.tasks import induction

BASELINES = ("zero", "mean", "resample", "counterfactual")


@pytest.mark.parametrize("program", ["frac_prevs", "pair_balance", "reverse"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_inactive_heads_score_exactly_zero_by_every_ablation(program, baseline):
    known = tracr(program)
    scores = importance(known.model, known.task, baseline=baseline, progress=False)
    assert known.inactive_heads
    for head in known.inactive_heads:
        assert np.abs(scores.per_prompt[head]).max() == 0


@pytest.mark.parametrize("by", ["gradient", "attribution", "atp"])
def test_inactive_heads_score_exactly_zero_by_every_estimate(by):
    known = tracr("frac_prevs")
    scores = importance(known.model, known.task, method=by, progress=False)
    for head in known.inactive_heads:
        assert np.abs(scores.per_prompt[head]).max() == 0


@pytest.mark.parametrize(
    "program",
    ["frac_prevs", "hist", "induction_causal", "pair_balance", "reverse", "sort_unique"],
)
def test_active_heads_are_found(program):
    known = tracr(program)
    scores = importance(known.model, known.task, baseline="zero", progress=False)
    for head in known.heads:
        assert np.abs(scores.per_prompt[head]).max() > 0.1


def test_a_head_that_works_by_position_alone_is_seen_by_zero_and_not_by_other_prompts():
    """`reverse` first counts the tokens: prompts of one length give the same, so nothing is changed."""
    known = tracr("reverse")
    found = {
        name: importance(known.model, known.task, baseline=name, progress=False)
        for name in ("zero", "mean", "counterfactual")
    }
    counting = known.heads[0]
    assert np.abs(found["zero"].per_prompt[counting]).max() > 1
    for name in ("mean", "counterfactual"):
        assert np.abs(found[name].per_prompt[counting]).max() < 1e-5


def test_gates_and_the_measures_that_cannot_see_them():
    """OR: no single ablation and no gradient sees either input, the pair is worth 1. AND: each counts 1."""
    for gate, alone, pair in (("or", 0, 1), ("and", 1, 1), ("sum", 1, 2)):
        known = logic_gate(gate)
        both = ablate(
            known.model, known.task, heads=["L0H0", "L0H1"], baseline="zero", progress=False
        )
        assert both.value == pytest.approx(pair)
        for by in ("ablation", "gradient"):
            single = importance(known.model, known.task, method=by, baseline="zero", progress=False)
            np.testing.assert_allclose(single.values, [[alone, alone]], atol=1e-6)


def test_a_saturated_softmax_hides_the_head_before_it_from_every_estimate():
    """Hand-built induction, beta 30: L0H0 is worth 2 by ablation; only L1H0's key shows it by AtP*."""
    known = induction_transformer(beta=30, dtype="float64")
    task = list(known.tasks.values())[1]  # the first of the two equal tokens
    ablated = importance(known.model, task, baseline="counterfactual", progress=False)
    plain = importance(known.model, task, method="attribution", progress=False)
    fixed = importance(known.model, task, method="atp", progress=False)
    assert ablated.values[0, 0] == pytest.approx(2, abs=1e-6)
    assert abs(plain.values[0, 0]) < 1e-6
    assert abs(fixed.values[0, 0]) < 1e-6
    assert fixed.values[1, 0] == pytest.approx(2, abs=1e-6)
    assert np.abs(ablated.values[:, 1]).max() == 0


def test_disagreement_and_redundancy_are_said_in_words():
    model = lens.load("induction-2l")
    task = induction(model, n=16)
    zero = importance(model, task, baseline="zero", progress=False)
    mean = importance(model, task, baseline="mean", progress=False)
    gradient = importance(model, task, method="gradient", progress=False)
    first, *_, last = agreement(zero, mean, gradient, k=1, resamples=50).findings()
    assert "ablation (zero) and ablation (mean) share their most important head (100%" in first
    assert "L0H1 only by ablation (mean)" in last
    assert "share no most important head (0%" in last
    group = ablate(model, task, heads=["L1H0", "L1H2", "L1H3"], progress=False)
    (alone,) = group.findings()
    row = group.table().iloc[0]
    assert (row["heads"], row["n"], alone.kind) == ("L1H0, L1H2, L1H3", 16, "worth")
    assert alone.startswith(
        f"Together L1H0, L1H2, L1H3 are worth {row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}] "
    )
    (said,) = group.findings(mean)
    assert said.startswith("Together L1H0, L1H2, L1H3 are worth ")
    assert "single-head importance understates them" in said
    assert said.kind == "understated"
    low, high = group.interaction_interval(mean)
    paired = group.per_prompt - sum(mean.per_prompt[head] for head in group.heads)
    (_,), (expected_low,), (expected_high,) = columns("", paired[None], 0).values()
    assert (low, high) == (expected_low, expected_high)
    assert f"{group.interaction(mean):+.3g} [{low:+.3g}, {high:+.3g}]" in said
    known = logic_gate("and")
    made = importance(known.model, known.task, baseline="zero", progress=False)
    pair = ablate(known.model, known.task, heads=["L0H0", "L0H1"], baseline="zero", progress=False)
    assert "one prompt tells nothing of single heads beside the group" in pair.findings(made)[0]
