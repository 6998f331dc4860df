"""Sentences of sections that name the best of several: with its interval, and what it is not told apart from."""

import numpy as np
from lens_analyses.steps.layers import _least, _missed
from lens_analyses.steps.policies import _worst

from lens.heads.pruning.sublayer_scores import BlockInfluence, SkipSweep
from lens.policies.running import PolicyRuns

NAMES = ("L0.attention", "L0.mlp", "L1.attention")


def sweep(*drops):
    values = np.array(drops)
    return SkipSweep(NAMES, values, values, np.ones(3), "cosine", "loss", "toy", "m")


def test_the_sub_layer_that_is_missed_most_stands_beside_those_it_is_not_told_apart_from():
    most = "Missed most on toy is L0.mlp: loss is worse by 0.5 [0.4, 0.6] without it, by 0.1 without the median sub-layer"
    apart = sweep([0.1, 0.1, 0.1], [0.4, 0.5, 0.6], [0.0, 0.0, 0.0])
    assert _missed(apart, 0) == f"{most}."
    alike = sweep([0.1, 0.1, 0.1], [0.4, 0.5, 0.6], [-0.9, 0.9, 0.0])
    assert _missed(alike, 0) == f"{most}; not told apart from L1.attention."


def test_the_layer_that_turns_the_stream_least_stands_beside_those_it_is_not_told_apart_from():
    turns = np.array([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3], [0.2, 0.1, 0.6]])
    least = "Layer 1 turns the residual stream least (1 - cosine 0.2 [0.1, 0.3])"
    assert _least(BlockInfluence(turns[:2], "toy", "m"), 0) == f"{least}."
    assert _least(BlockInfluence(turns, "toy", "m"), 0) == f"{least}; not told apart from L2."
    one = _least(BlockInfluence(turns[:, :1], "toy", "m"), 0)
    assert one == "Layer 1 turns the residual stream least (1 - cosine 0.1)."


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
    said = _worst(runs, runs.table().assign(task="text", rows="all"))
    assert said == (
        "Text, all rows sparse: the loss is 2.0000 dense; its change is the best under A -0.2000 [-0.3000, -0.1000] "
        "at 10.0% and the worst under C +0.5000 [+0.4000, +0.6000] at 30.0%."
    )
