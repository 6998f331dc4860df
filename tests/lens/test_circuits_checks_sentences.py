"""What checks of circuits and patches say, word by word, and what they say where it would be the opposite."""

from dataclasses import replace

import numpy as np
import pytest

from lens.circuits.checks._control import Control
from lens.circuits.checks._minimality import Minimality
from lens.circuits.checks._stability import Stability
from lens.circuits.checks.evaluation import CircuitEvaluation, Outcome
from lens.circuits.graph.activations import Ablation
from lens.circuits.patches.effects import PatchEffects
from lens.common.errors import LensError

ONES, ZEROS = np.ones(4), np.zeros(4)


def outcome(*faithfulness):
    """Of circuits that keep these shares of the metric, the same on every prompt."""
    kept = np.array(faithfulness)[:, None] * ONES
    return Outcome(kept, kept * 0, ONES, ZEROS)


def test_control():
    found = Control(
        outcome(0.9),
        {"uniform": np.array([0.1, 0.2, 0.3]), "degrees": np.full(3, 0.95)},
        {"uniform": 0.75, "degrees": 0.5},
        12,
        "made",
        0,
    )
    assert found.findings() == (
        "The circuit of 12 edges has a faithfulness of 0.90 [0.90, 0.90]; of as many edges, random ones 0.20 "
        "[0.11, 0.29] (p = 0.25; 75% other edges); random ones with the same degrees 0.95 [0.95, 0.95] (p = 1.00; 50% other "
        "edges).",
    )
    one = Outcome(np.array([[0.9]]), ZEROS[:1, None], ONES[:1], ZEROS[:1])
    alone = replace(found, outcome=one, faithfulness={"uniform": np.array([0.2])})
    assert alone.findings() == (
        "The circuit of 12 edges has a faithfulness of 0.90; of as many edges, random ones 0.20 (p = 0.50; 75% other edges).",
    )
    only = replace(found, faithfulness={"degrees": np.empty(0)}, apart={"degrees": np.nan})
    assert only.findings() == (
        "The circuit of 12 edges has a faithfulness of 0.90 [0.90, 0.90]; of as many edges, no other circuit is there for "
        "random ones with the same degrees.",
    )
    row = only.table().to_dict("records")[1]
    assert np.isnan([row[name] for name in ("faithfulness", "low", "high", "p", "apart")]).all()
    assert row["draws"] == 0
    assert "degrees none" in repr(only)


def test_evaluation():
    shares = (0.0, 0.5, 1.0)
    found = CircuitEvaluation(
        shares, outcome(0, 1, 1), outcome(0, 0.5, 1), np.array([[0, 0.2, 1], [0, 0.4, 1]]),
        np.array([0, 5, 10]), Ablation("zero"), "eap", "loss", "made", "small", 0,
    )  # fmt: skip
    assert found.findings() == (
        "Over all sizes, on 4 prompts, the circuit performance ratio (CPR, more is better) is 0.75 [0.75, 0.75] and of random "
        "circuits, drawn 2 times, 0.40 (0.35 to 0.45); the circuit-model distance (CMD, less is better) 0.50 [0.50, 0.50] and "
        "0.60 (0.55 to 0.65).",
    )
    varied = np.array([[0.0, 0, 0, 0], [0.2, 0.6, 1, 1.4], ONES])
    wide = replace(found, signed=Outcome(varied, varied * 0, ONES, ZEROS))
    assert wide.cpr == pytest.approx(0.65)
    assert "is 0.65 [0.28, 1.02] and of random" in wide.findings()[0]
    single = Outcome(varied[:, :1], varied[:, :1] * 0, ONES[:1], ZEROS[:1])
    said = " ".join(replace(found, signed=single, absolute=single).findings())
    assert "on 1 prompt, the circuit performance ratio (CPR, more is better) is 0.35 and of" in said
    (one,) = replace(found, random=found.random[:1]).findings()
    assert "of random circuits, drawn 1 time, 0.35; the" in one
    assert one.endswith("0.50 [0.50, 0.50] and 0.65.")


def test_shares_of_a_metric_of_which_less_is_better_are_none(patched):
    """A loss that rises from 1 to 3 was 3 times recovered."""
    loss = Outcome(np.full((1, 4), -3.0), np.zeros((1, 4)), -ONES, -3 * ONES)
    found = CircuitEvaluation(
        (1.0,), loss, loss, np.ones((2, 1)), np.array([1]), Ablation("zero"), "eap", "loss", "made", "small", 0,
    )  # fmt: skip
    assert found.table()["recovered"].isna().all()
    gain = replace(found, signed=outcome(0.5), absolute=outcome(0.5))
    assert list(gain.table()["recovered"]) == [0.5, 0.5]
    assert patched.relative[0, 0] == pytest.approx(-0.5)
    assert np.isnan(replace(patched, base=-ONES, patched=-patched.patched).relative).all()


def test_minimality():
    drops = np.array([[0.4, 0.5, 0.6, 0.5], [0.001, -0.001, 0.001, -0.001]])
    found = Minimality(
        ("a0.h0", "m1"), drops, ((), ()), np.array([0.01, -0.02]), ONES, ZEROS, "loss", "made", 0
    )
    assert found.findings() == (
        "1 of the 2 heads and MLPs that were taken out of it change the task by at least 1 %, 1 of them with an interval "
        "that excludes 0; most do a0.h0 50%, m1 0% (of 2 parts of random circuits 95 % at most 1.9%).",
    )
    sure = replace(found, drops=np.array([drops[0], [0.002, 0.001, 0.002, 0.001]]))
    assert (
        "at least 1 %, 1 of them with an interval" in sure.findings()[0]
    )  # m1's is sure, and too small
    worse = replace(found, drops=-drops[:, :1], full=ZEROS[:1], empty=ONES[:1])
    assert worse.findings() == (
        "1 of the 2 heads and MLPs that were taken out of it change the task by at least 1 %; most do a0.h0 40%, m1 0% "
        "(of 2 parts of random circuits 95 % at most 1.9%).",
    )
    against = replace(found, drops=-drops)
    assert "most do a0.h0 -50%, m1 0%" in against.findings()[0]
    assert list(against.table()["node"]) == ["a0.h0", "m1"]
    with pytest.raises(LensError, match="ablating every edge does not change the metric"):
        replace(found, empty=ONES).findings()


def test_stability():
    found = Stability(np.array([0.5, 0.7]), np.array([0.8, 1.0]), 0.1, ZEROS, "resamples", 3)
    assert found.findings() == (
        "Made anew from prompts drawn again, 3 times, circuits share 60% of their edges (Jaccard index, pairs 50% to "
        "70%; random ones of these sizes 10.0%) and 90% of their parts.",
    )
    said = " ".join(replace(found, what="circuits").findings())
    assert said.startswith("The 3 circuits share 60% of their edges")


@pytest.fixture
def patched():
    """A head that moves half of the metric, one that moves nothing but rounding, one that moves against it."""
    moved = np.array([[-0.5, -0.4, -0.6, -0.5], [1e-9, 1e-9, 1e-9, 1e-9], [0.1, 0.2, 0.1, 0.2]])
    return PatchEffects(
        ("a0.h0", "a0.h1", "m0"), ("7",), 1 + moved[:, None], ONES, ZEROS, "noising", (), "loss", "made", "small"
    )  # fmt: skip


def test_patch_effects(patched):
    assert patched.findings() == (
        "Of 3 places a0.h0 at 7 moves most: -0.5 [-0.715, -0.285] of the -1 loss between both runs, the median place "
        "+1e-09.",
        "2 of 3 places have a 95 % interval that leaves out 0 (0.2 by chance).",
    )
    alone = replace(
        patched,
        patched=patched.patched[:, :, :1],
        base=ONES[:1],
        source=ZEROS[:1],
        positions=("all",),
    )
    assert alone.findings() == (
        "Of 3 places a0.h0 moves most: -0.5 of the -1 loss between both runs, the median place +1e-09.",
    )
    worse = replace(patched, sign=-1).findings()[0]
    assert "of the -1 loss between both runs (up is worse), the median" in worse
    nothing = " ".join(replace(patched, source=ONES).findings())
    assert nothing.startswith(
        "Both runs have the same loss (1, mean of 4 prompts), so there is nothing"
    )


def test_the_place_that_moves_most_is_the_one_of_the_table_and_the_repr(patched):
    """It was the largest effect with its sign: of one that moves 0.9 against the other run nothing was said."""
    moved = np.array([[-0.1] * 4, [0.9] * 4, [0.0] * 4])
    found = replace(patched, patched=1 + moved[:, None])
    assert found.findings()[0] == (
        "Of 3 places a0.h1 at 7 moves most, away from the other run: +0.9 [+0.9, +0.9] of the -1 loss between both "
        "runs, the median place +0; towards it a0.h0 at 7 most, -0.1 [-0.1, -0.1]."
    )
    assert "largest a0.h1@7 -0.90" in repr(found)
    against = replace(patched, patched=1 + np.abs(moved)[:, None])
    assert "towards it" not in against.findings()[0]


def test_prompts_that_change_both_ways_are_not_said_to_change_nothing(patched):
    (same,) = replace(patched, source=ONES).findings()
    assert same.endswith("the corrupt prompts do not change what is measured.")
    base, source = np.array([1.0, 2.0, 1.0, 2.0]), np.array([2.0, 1.0, 2.0, 1.0])
    (found,) = replace(patched, base=base, source=source).findings()
    assert found.endswith(
        "do not change what is measured on average, though of single prompts by up to 1."
    )
