"""Sentences of sections that name the best of several: with its interval, and what it is not told apart from."""

from types import SimpleNamespace

import numpy as np
import pytest
from lens_analyses.steps.columns import defined
from lens_analyses.steps.layers import layers
from lens_analyses.steps.policies import _told
from lens_analyses.steps.table import heads

import lens
from lens.common.errors import LensError
from lens.heads.pruning.sublayer_scores import BlockInfluence, GreedyRemoval, SkipSweep
from lens.policies.running import PolicyRuns

NAMES = ("L0.attention", "L0.mlp", "L1.attention")


def sweep(*drops):
    values = np.array(drops)
    return SkipSweep(NAMES, values, values, np.ones(3), "cosine", "loss", "toy", "m")


def test_the_sub_layer_that_is_missed_most_stands_beside_those_it_is_not_told_apart_from():
    told = "ithout L0.mlp loss is worse by 0.5 [0.022, 0.978] (on toy, n = 3), without the median sub-layer by 0.1"
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
    least = "Layer 1 turns the residual stream least: 1 - cosine 0.2"
    assert list(BlockInfluence(turns[:2], "toy", "m").findings()) == [
        f"{least} [0, 0.588] (the lowest of 2, n = 3), the median layer 0.4."
    ]
    (alike,) = BlockInfluence(turns, "toy", "m").findings()
    assert (
        alike
        == f"{least} [0, 0.678] (the lowest of 3, n = 3), the median layer 0.3; not told apart from L2."
    )
    (one,) = BlockInfluence(turns[:, :1], "toy", "m").findings()
    assert (
        one
        == "Layer 1 turns the residual stream least: 1 - cosine 0.1 (the lowest of 3, n = 1), the median layer 0.2."
    )


def test_the_best_and_the_worst_policy_are_told_with_intervals_and_by_their_sign():
    """Where less is better, the best change is the lowest, which need not be the one that changes least."""
    dense = np.full(3, 2.0)
    sparse = dense + np.array(
        [[-0.21, -0.19, -0.2], [0.1, 0.0, -0.1], [0.49, 0.5, 0.51], [3.0, 3.0, 3.0]]
    )
    names = ("A", "B", "C", "RandomBlocks(share=0.5)")
    runs = PolicyRuns(
        dense, sparse, sparse, np.array([0.1, 0.2, 0.3, 0.5]), names, "loss", -1, None, 0, "m"
    )
    best, worst, random = _told(runs, runs.table().assign(task="text", rows="all"))
    assert best == (
        "Text, all rows sparse, the best of 3: Under A, with 10.0% of the blocks, the loss goes from 2.0000 to 1.8000, -0.2000 "
        "[-0.2269, -0.1731] (better); KL 1.8000 nats."
    )
    assert worst.startswith("Text, all rows sparse, the worst of 3: Under C, ")
    assert "+0.5000 [+0.4731, +0.5269] (worse)" in worst
    assert random.startswith(
        "Text, all rows sparse, at random: Under RandomBlocks(share=0.5), with 50.0% of"
    )
    rows = runs.table().assign(task="text", rows="all")
    alone, random = _told(runs, rows[rows["policy"].isin(["B", names[-1]])])
    assert "the best of 1: Under B" in alone
    assert "at random" in random


def test_what_a_model_refuses_of_its_layers_leaves_the_rest_of_the_section(monkeypatch):
    def refuse(*_, **__):
        raise LensError("its layers are not found")

    model = lens.load("text-lm-3l")
    subject = SimpleNamespace(
        model=model, task=lens.tasks.induction(model, 2), seed=0, progress=False
    )
    monkeypatch.setattr("lens_analyses.steps.layers.measures.block_influence", refuse)
    section = layers(subject)  # pyright: ignore[reportArgumentType]
    assert set(section.tables) == {"sweep", "removal"}
    assert (
        section.limits[-1]
        == "How far layers turn the stream is not known: its layers are not found."
    )
    monkeypatch.setattr("lens_analyses.steps.layers.measures.importance", refuse)
    with pytest.raises(LensError, match=r"No sub-layer was left out: its layers are not found$"):
        layers(subject)  # pyright: ignore[reportArgumentType]


def test_the_table_of_heads_tells_roles_of_one_row_without_an_interval():
    """A copied prompt of two tokens behind the first has one induction row, of which nothing is drawn again."""
    model = lens.load("induction-2l")
    roles = lens.heads.roles(model, [[0, 9, 9]], progress=False)
    assert roles.table()["induction_low"].isna().all()
    table = roles.table()
    scores = table[["name", "layer", "head"]].assign(zero=np.arange(len(table), dtype=float))
    sections = {
        "roles": SimpleNamespace(tables={"copied": table}, columns=defined([table], roles.columns)),
        "importance": SimpleNamespace(
            tables={"scores": scores},
            columns={"zero": "Made up."},
            configuration={"measures": [{"method": "ablation", "label": "zero", "task": "toy"}]},
        ),
    }
    run = SimpleNamespace(heads=table, sections=list(sections), section=sections.__getitem__)
    section = heads(SimpleNamespace(run=run, model=model))  # pyright: ignore[reportArgumentType]
    (said,) = section.summary
    assert (
        f"the highest induction score, {table['induction'].max():.2f}; by zero it is number "
        in said
    )
