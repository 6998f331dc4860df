"""Sentences of what is measured of heads, by hand: each with its interval and what it stands beside."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.heads.behaviour.roles import HeadRoles
from lens.heads.behaviour.streaming import StreamingScores
from lens.heads.likeness.head_similarity import HeadSimilarity
from lens.heads.likeness.stability import HeadStability
from lens.heads.measures.scores import Intervention
from lens.heads.pruning.curves import PruningCurve
from lens.heads.pruning.gates import StreamingGate
from lens.heads.pruning.outputs import METRICS, PruningMetrics
from lens.policies.maps import PolicyMaps
from lens.traces.variance import SOURCES, VarianceShares, shares_of

HEADS = tuple(HeadId(0, head) for head in range(3))


def test_a_gate_says_what_it_keeps_and_from_which_value_on():
    gate = StreamingGate(np.array([[0.9, 0.2]]), np.ones(3), 4, 1, 8, 0.05, 0.02, 5, 2, "m")
    assert list(gate.findings()) == [
        "The trained gate keeps 2 of 4 heads in full, with a gate above 0.5: L0H0, L0H1; the others see the first 1 and the "
        "last 8 keys. Gates lie from 0.20 to 0.90, of one training (seed 5, n = 2)."
    ]


def stable(*pairs):
    jaccard = np.array([[0.69, 0.71], [0.1, 0.3], [-0.2, 0.2]])[:, : len(pairs)]
    error = np.array([[0.01, 0.02], [0.01, 0.2], [0.3, 0.3]])[:, : len(pairs)]
    values = {}
    for first, second in (("a", "b"), ("b", "a")):
        values[first, second, "jaccard", "raw"] = jaccard + 0.1
        values[first, second, "jaccard", "sink_excluded"] = jaccard
        values[first, second, "jaccard_uniform", "sink_excluded"] = jaccard * 0 + 0.4
        values[first, second, "mass_error_p99", "raw"] = error
    return HeadStability(values, 0.2, HEADS)


def test_patterns_are_told_once_a_pair_and_the_lse_in_both_directions():
    shared, there, back = stable(0, 1).findings()
    assert (shared.kind, there.kind) == ("pattern", "lse")
    assert shared == (
        "Between a and b, all 2 pairs of prompts, the first key block and the diagonal left out: 1 of 3 heads share more of "
        "their strongest 20% of blocks than random ones do (0.1 by chance), 1 of 3 more than with uniform attention (the median head 0.40); most L0H0, Jaccard index above chance 0.70 "
        "[0.42, 0.98], the median head 0.20 (0 is chance, 1 the same blocks)."
    )
    assert (
        there
        == "The LSE of a serves for b on all 2 pairs of prompts in 1 of 3 heads (99 % of rows within 5%)."
    )
    assert back.startswith("The LSE of b serves for a")
    one = stable(0).findings()
    assert (
        "one pair of prompts, the first key block and the diagonal left out: one pair has no interval"
        in one[0]
    )
    nothing = {("a", "b", "jaccard", "raw"): np.full((3, 1), np.nan)}
    assert HeadStability(nothing, 0.2, HEADS).findings() == ()


def test_shares_of_variance_have_intervals():
    values = np.random.default_rng(0).normal(0, 1, (2, 3, 4)) + 5 * np.arange(4)
    own = shares_of(values)
    found = VarianceShares(
        values, ("half", "whole"), "entropy", "raw", np.stack([own - 0.01, own + 0.01])
    )
    (said,) = found.findings()
    assert said.startswith(
        "Of the variance of entropy (raw) over the conditions half, whole, 3 prompts and 4 heads most belongs to: head 9"
    )
    low, high = found.table().set_index("source").loc["head", ["low", "high"]]
    assert f"[{low:.0%}, {high:.0%}]" in said
    assert sum(name in said for name in SOURCES) >= 3
    assert "(noise alone 13%)" in said  # 3 of 23 degrees of freedom
    one = replace(found, values=values[:, :1], drawn=np.empty((0, 7))).findings()[0]
    assert "1 prompt and 4 heads" in one
    assert one.endswith("; one prompt has no interval.")


def test_what_noise_gives_each_source_is_said():
    """Of random numbers the interaction with most degrees of freedom has most of the variance."""
    drawn = [np.random.default_rng(seed).normal(size=(2, 4, 8)) for seed in range(200)]
    shares = np.mean([shares_of(values) for values in drawn], 0)
    one = VarianceShares(drawn[0], ("a", "b"), "entropy", "raw", np.empty((0, 7)))
    for name, share in zip(SOURCES, shares, strict=True):
        size = np.array([2, 4, 8])[list(SOURCES[name])] - 1
        assert share == pytest.approx(np.prod(size) / 63, abs=0.02)
        if name in one.table().nlargest(3, "share")["source"].tolist():
            assert f"(noise alone {np.prod(size) / 63:.0%})" in one.findings()[0]


def metrics(drops, labels=(0, 0, 1)):
    values = np.array(drops)[None]
    per_example = {name: values * (1 if name != "js" else 0) for name in METRICS}
    return PruningMetrics(
        per_example, None if labels is None else np.array(labels), 2 / 3, "zero", "m"
    )


def test_pruned_heads_stand_beside_the_median_head_and_the_accuracy_beside_chance():
    drops = [[0.1, 0.1, 0.1], [0.5, 0.6, 0.7], [0.0, 0.0, 0.0]]
    said = {one.kind: one for one in metrics(drops).findings()}
    assert list(said) == ["accuracy", "most", "agreement"]
    assert said["accuracy"].startswith("The whole model names 66.7% [")
    assert said["accuracy"].endswith(
        "of 3 examples rightly; always naming the most frequent of 2 classes would 66.7%."
    )
    assert said["most"] == (
        "The right answer loses most probability without L0H1: 0.6 [0.122, 1], without the median head 0.1 (n = 3)."
    )
    assert "Kendall tau of 1.00 (median of 10 pairs; 0 is chance)" in said["agreement"]
    drops[1] = [0.001, 0.6, 0.7]
    said = {one.kind: one for one in metrics(drops, None).findings()}
    assert list(said) == ["none", "agreement"]
    assert said["none"].startswith(
        "No head is told apart from none as the worst of 3. The right answer loses most"
    )


def test_metrics_that_no_head_changes_order_none():
    said = {one.kind: one for one in metrics(np.zeros((3, 3))).findings()}
    assert (
        said["agreement"]
        == "No two of the metrics tell heads apart, so that they order none alike."
    )


def curve(draws):
    values = np.array([[1.0, 1.0], [1.1, 1.3], [1.5, 1.5]])
    random = np.array([[[1.0, 1.0], [1.4, 1.4], [2.0, 2.0]], [[1.0, 1.0], [1.6, 1.6], [2.0, 2.0]]])[
        :draws
    ]
    return PruningCurve(
        np.arange(3),
        HEADS[:2],
        values,
        random,
        "attribution",
        Intervention("mean"),
        "loss",
        -1,
        "text",
        "m",
    )


def test_a_curve_says_what_half_of_its_heads_cost_beside_random_orders():
    told = "The first 1 of 2 heads, attribution first, cost 0.2 [0, 1.12] of loss on text (n = 2)"
    assert list(curve(2).findings()) == [
        f"{told}; as many in 2 random orders 0.5 on the mean (0.4 to 0.6)."
    ]
    assert list(curve(0).findings()) == [f"{told}."]
    assert "as many in 1 random order 0.4 on" in str(curve(1).findings()[0])
    with pytest.raises(LensError, match="cost must be a number, in units of the metric, got 'x'"):
        curve(1).prunable("x")


@pytest.mark.parametrize("floor", [None, np.full((3, 3), 0.25)])
def test_the_closest_heads_stand_beside_the_floor_and_the_median_pair(floor):
    sums = np.zeros((2, 3, 3))
    for a, b, value in ((0, 1, 0.1), (0, 2, 0.3), (1, 2, 0.5)):
        sums[:, a, b] = sums[:, b, a] = value
    found = HeadSimilarity(sums, np.ones_like(sums), "js", False, "exact", HEADS, "m", floor)
    across = "" if floor is None else ", across different prompts 0.25"
    assert list(found.findings()) == [
        "Of 3 pairs L0H0 is closest to L0H1: Jensen-Shannon divergence of attention (nats) 0.1 [0.1, 0.1]"
        f"{across}, the median pair 0.3 (n = 2)."
    ]
    (said,) = replace(found, sink_excluded=True).findings()
    assert "attention (nats), sink excluded 0.1 [" in said


def test_maps_of_policies_say_which_share_of_blocks_holds_which_mass():
    visible = np.tril(np.ones((2, 2), bool))[None, None]
    kept = np.array([[True, False], [False, True]])[None, None]
    masses = np.array([[1.0, 0.0], [0.75, 0.25]])[None, None]
    found = PolicyMaps(
        np.stack([kept, visible]), masses, visible, ("near", "Full()"), (3,), (8, 8), 16, "m"
    )
    assert list(found.findings()) == [
        "near keeps 66.7% of the visible blocks, with 62.5% of their mass in one prompt of 16 tokens.",
        "Full() keeps 100.0% of the visible blocks, with 100.0% of their mass in one prompt of 16 tokens.",
    ]


def test_streaming_says_with_intervals_what_is_kept_and_whose_outputs_change_most():
    kept = np.array([[[0.9, 0.7], [0.5, 0.5]]])
    error = np.array([[[0.1, 0.1], [0.4, 0.6]]])
    found = StreamingScores(kept, error, error, np.full(2, np.nan), (9, 9), "absent", 1, 4, "m")
    said = {one.kind: one for one in found.findings()}
    assert said["kept"] == (
        "With the first 1 and the last 4 keys rows keep 65.0% [19.2%, 100.0%] of their attention (the poorest head, L0H1, 50.0% "
        "[50.0%, 50.0%]), and head outputs are off by 30.0% [0.0%, 75.8%]."
    )
    assert said["error"] == (
        "The outputs of L0H1 change most: by 0.50 [0.00, 1.50] of their size, mean over rows, those of the median head by 0.30."
    )
    assert said["limit"].startswith("Measured on 2 prompts of 9 tokens, BOS absent; ")


def test_roles_stand_beside_both_chances_and_say_what_the_interval_says(monkeypatch):
    table = pd.DataFrame(
        {"name": ["L0H0", "L0H1"], "layer": 0, "head": [0, 1], "induction": [0.5, 0.3]}
    )
    table = table.assign(
        induction_low=[0.4, np.nan], induction_high=[0.6, np.nan], induction_baseline=0.03
    )
    monkeypatch.setattr(HeadRoles, "table", lambda _: table)
    roles = HeadRoles(pd.DataFrame(), pd.DataFrame(), "uniform", 2, "m", 0)
    (said,) = roles.findings(columns=["induction"], most=2, random_weights={"induction": 0.45})
    assert said == (
        "Most induction of 2 heads on 2 prompts: L0H0 0.50 [0.30, 0.70] (above uniform 0.03, not told apart from the highest of random weights 0.45), "
        "L0H1 0.30 (not told apart from uniform 0.03 and the highest of random weights 0.45)."
    )
    (said,) = roles.findings(columns=["induction"], random_weights={"induction": np.nan})
    assert (
        said
        == "Most induction of 2 heads on 2 prompts: L0H0 0.50 [0.30, 0.70] (above uniform 0.03)."
    )
    (said,) = roles.findings(columns=["induction"], random_weights={"induction": 0.35})
    assert (
        "not told apart from the highest of random weights 0.35" in said
    )  # the own interval begins at 0.40
    (said,) = roles.findings(columns=["induction"], random_weights={"induction": 0.8})
    assert "(above uniform 0.03, below the highest of random weights 0.80)" in said
    (said,) = roles.findings(columns=["induction"], random_weights={"induction": 0.1})
    assert "(above uniform 0.03 and the highest of random weights 0.10)" in said
