"""Sentences of sections that name the best of several: with its interval, and what it is not told apart from."""

import numpy as np
from lens_analyses.steps.policies import _told

from lens.heads.pruning.sublayer_scores import BlockInfluence, GreedyRemoval, SkipSweep
from lens.policies.running import PolicyRuns

NAMES = ("L0.attention", "L0.mlp", "L1.attention")


def sweep(*drops):
    values = np.array(drops)
    return SkipSweep(NAMES, values, values, np.ones(3), "cosine", "loss", "toy", "m")


def test_the_sub_layer_that_is_missed_most_stands_beside_those_it_is_not_told_apart_from():
    told = "ithout L0.mlp loss is worse by 0.5 [0.4, 0.6] (on toy, n = 3), without the median sub-layer by 0.1"
    most, chance = sweep([0.1, 0.1, 0.1], [0.4, 0.5, 0.6], [0.0, 0.0, 0.0]).findings()
    assert (most, most.kind) == (f"W{told}.", "most")
    assert chance == "2 of 3 sub-layers have a 95 % interval that leaves out 0 (0.2 by chance)."
    alike = {
        one.kind: one
        for one in sweep([0.1, 0.1, 0.1], [0.4, 0.5, 0.6], [-0.9, 0.9, 0.0]).findings()
    }
    assert alike["most"] == f"W{told}; not told apart from L1.attention."
    (none,) = sweep([0.1, 0.1, 0.1], [0.01, 0.5, 0.6], [0.0, 0.0, 0.0]).findings()
    assert none.kind == "none"
    assert none.startswith(
        "No sub-layer is told apart from none as the most missed of 3: without L0.mlp loss "
    )
    (one,) = sweep([0.1], [0.5], [0.0]).findings()
    assert "worse by 0.5 (on" in one


def test_what_greedy_removal_takes_is_said_as_a_paired_change():
    losses = np.array([[1.0, 2.0, 3.0], [1.1, 2.1, 3.1], [1.5, 2.5, 3.5]])
    (said,) = GreedyRemoval(NAMES[:2], losses[:2], losses, 4, "js", "loss", "toy", "m").findings()
    assert said == (
        "Without L0.attention, L0.mlp, 2 of 4 sub-layers, taken out in this order by js of the outputs, the loss changes by "
        "+0.5 [+0.5, +0.5] from 2 (paired, n = 3); the order was chosen on these prompts."
    )


def test_the_layer_that_turns_the_stream_least_stands_beside_those_it_is_not_told_apart_from():
    turns = np.array([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3], [0.2, 0.1, 0.6]])
    least = "Layer 1 turns the residual stream least: 1 - cosine 0.2 [0.1, 0.3] (n = 3), the median layer"
    assert list(BlockInfluence(turns[:2], "toy", "m").findings()) == [f"{least} 0.4."]
    (alike,) = BlockInfluence(turns, "toy", "m").findings()
    assert alike == f"{least} 0.3; not told apart from L2."
    (one,) = BlockInfluence(turns[:, :1], "toy", "m").findings()
    assert (
        one
        == "Layer 1 turns the residual stream least: 1 - cosine 0.1 (n = 1), the median layer 0.2."
    )


def test_the_best_and_the_worst_policy_are_told_with_intervals_and_by_their_sign():
    """Where less is better, the best change is the lowest, which need not be the one that changes least."""
    dense = np.full(3, 2.0)
    sparse = dense + np.array(
        [[-0.3, -0.1, -0.2], [0.1, 0.0, -0.1], [0.4, 0.5, 0.6], [3.0, 3.0, 3.0]]
    )
    names = ("A", "B", "C", "RandomBlocks(share=0.5)")
    runs = PolicyRuns(
        dense, sparse, sparse, np.array([0.1, 0.2, 0.3, 0.5]), names, "loss", -1, None, 0, "m"
    )
    best, worst, random = _told(runs, runs.table().assign(task="text", rows="all"))
    assert best == (
        "Text, all rows sparse, the best of 3: Under A, with 10.0% of the blocks, the loss goes from 2.0000 to 1.8000, -0.2000 "
        "[-0.3000, -0.1000] (better); KL 1.8000 nats."
    )
    assert worst.startswith("Text, all rows sparse, the worst of 3: Under C, ")
    assert "+0.5000 [+0.4000, +0.6000] (worse)" in worst
    assert random.startswith(
        "Text, all rows sparse, at random: Under RandomBlocks(share=0.5), with 50.0% of"
    )
