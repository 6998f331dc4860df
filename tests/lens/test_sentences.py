"""What results say, word for word, of numbers by hand: another head, order, side or share would be another sentence."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens.circuits.checks._positions import PositionEvaluation
from lens.circuits.checks.evaluation import Outcome
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.graph import Graph
from lens.circuits.scores.position_scores import PositionScores
from lens.common.head_ids import HeadId
from lens.common.results import of_kind
from lens.heads.behaviour.roles import HeadRoles
from lens.heads.measures.scores import HeadScores, Intervention
from lens.mixers.capturing import MixerCapture
from lens.mixers.measures import MixerMeasures
from lens.reading.attributing_blocks import BlockScores
from lens.reading.judged import Faithfulness
from lens.reading.logit_terms import LogitTerms
from lens.reading.retrieved import RetrievalKinds
from lens.reading.shares import ComponentShares
from lens.traces.alignment import Alignment
from lens.traces.denoised import Denoising
from lens.traces.overlays import Overlay
from lens.vision.structure import PatchSegments


def twice(values):
    """[..., 2] of two prompts, or trials, that are alike."""
    return np.repeat(np.asarray(values, float)[..., None], 2, -1)


def sizes():
    full, kept = np.ones(2), np.tile([0.1, 0.5], (5, 1))
    levels = ((0.9, 1), (0.2, 0.86), (0, 0.1), (0.84, 0.9), (0, 0))
    outcomes = tuple(Outcome(twice(one), np.zeros((2, 2)), full, 0 * full) for one in levels)
    return PositionEvaluation((0.1, 0.5), kept, kept, outcomes, 0, "eap", "t", "m")


def at_places():
    within, across = np.zeros((2, 2, 5)), np.zeros((2, 3, 1, 1, 2, 2))
    within[:, 0, 0], within[:, 1, 0], within[:, 1, 4] = 0.5, -0.5, 2
    across[:, 2, 0, 0, 1, 0] = 1.25
    graph, where = Graph(1, 1, 1, mlps=False), np.ones((2, 2, 3), bool)
    return PositionScores(
        graph, ("name", "rest"), where, within, across, "eap", Ablation(), "loss", "t", "m"
    )


def mixer(layer=3, check=2e-7):
    rows = {name: np.full((2, 8), 0.5) for name in ("mass", "entropy", "first_share")}
    rows |= {"size": np.ones((2, 8)), "negative": np.outer([0.25, 0.75], np.ones(8))}
    rows["distance"] = np.outer([1.0, 3.0], np.ones(8))
    maps, of_heads = np.zeros((2, 1, 1)), np.full(2, np.nan)
    return MixerMeasures(
        rows, maps, maps, maps[0], maps[0], of_heads, of_heads, of_heads, check, layer, "mamba2"
    )


def blocks(method="rollout", approximate=True):
    values = np.array([0.1, 0.5, -0.2, 0.3])
    return BlockScores(values, 4, ("a", "b", "c", "d"), method, approximate, "m")


def components():
    sizes = np.array([2.0, 1.0]), np.array([4.0, 3.0])
    carried = twice([3, 1]), twice([0.2, 0.8])
    return ComponentShares(HeadId(1, 2), 3, "pairs", sizes, *carried, 7, 0, "m")


def retrieval():
    means = [[[0.1, 0.9, 0.5]], [[0.9, 0.1, 0.5]], [[0.5, 0.1, 0.9]]]
    recalls = twice([[0.5], [0.25], [0.0]])
    clean = np.array([1.0, 0.5])
    return RetrievalKinds(twice(means), (1,), clean, recalls, twice([0.7]), 3, 0, "m")


def terms():
    change = twice([[[0.3, 0.1], [0.2, 0.25]], [[0.4, 0.6], [0.5, 0.5]]])
    return LogitTerms(("content", "position"), (2, 5), change, change, None, None, (), 0, "m")


def aligned(accuracy=(0.75, 0.5), tau=(0.2, 0.6)):
    names = ("monotonicity", "confidence", "accuracy", "chance", "shuffled", "error", "mass")
    measures = {name: np.full((2, 2), np.nan) for name in names}
    measures |= {"monotonicity": twice(tau), "accuracy": twice(accuracy)}
    measures["chance"] = twice((0.125, 0.25))
    measures["shuffled"] = twice((0.25, 0.5))
    return Alignment(measures, None, ((0, 0), (0, 1)), "m", None, "read", (9, 9))


def overlay(*values):
    return Overlay(np.array([values]), np.array([0.1]), ("L1H2",), "row 3", None, None)


def deleted():
    measures = [twice(one).transpose(0, 2, 1) for one in ([[0.2], [0.4], [0.3]], [[0.3], [0.1], [0.25]])]  # fmt: skip
    soft, agreement = np.zeros((3, 2, 1)), np.zeros((3, 2, 2))
    methods, why = ("raw", "rollout", "random"), {"flow": "too long"}
    drawn = np.zeros((2, 2, 2, 1))
    return Faithfulness(methods, (0.5,), *measures, soft, soft, agreement, drawn, why, {}, 0, "m")


def importance(method="ablation", baseline="mean", absolute=None):
    worth = np.array([[[0.5, 0.3], [0.1, -0.1]], [[-0.2, -0.4], [0.02, 0.02]]])
    how = Intervention(baseline)
    return HeadScores(worth, np.ones(2), method, how, "loss", -1, "copying", "m", absolute)


def roles(monkeypatch):
    """Of a table by hand; no head of it was scored for the first key."""
    table = pd.DataFrame({"name": ["L0H0", "L0H1"], "layer": 0, "head": [0, 1]})
    for column, values in (
        ("previous_token", [0.25, 0.75]),
        ("induction", [0.5, 0.1]),
        ("first_token", [np.nan, np.nan]),
    ):
        table[column] = values
        table[f"{column}_low"], table[f"{column}_high"] = table[column] - 0.1, table[column] + 0.1
        table[f"{column}_baseline"] = [0.03, 0.04]
    monkeypatch.setattr(HeadRoles, "table", lambda _: table)
    return HeadRoles(pd.DataFrame(), pd.DataFrame(), "random_weights", 2, "m", 0)


def segments():
    return PatchSegments(np.array([[0, 0, 0], [0, 1, 2]]), 0.25, "L1", None)


SAID = {
    sizes: [
        "Share of the edges' tokens that the smallest circuits of a faithfulness of 0.85 keep, with theirs: at places "
        "10.00% (0.90 [0.90, 0.90]), everywhere 50.00% (0.86 [0.86, 0.86]), random at places none; with as large a share "
        "of the ways across spans and the others cut 50.00% (0.90 [0.90, 0.90]), random ones none."
    ],
    at_places: [
        "Largest within spans (intervals as of the largest of all): a0.h0->logits at rest 2 [2, 2], input->a0.h0<q> at name 0.5 [0.5, 0.5], input->a0.h0<q> at"
        " rest -0.5 [-0.5, -0.5]; the median size of 10 is 0.",
        "Largest across spans (intervals as of the largest of all): a0.h0<v> at rest from name 1.25 [1.25, 1.25], a0.h0<q> at name from name 0 [0, 0], "
        "a0.h0<q> at name from rest 0 [0, 0]; the median size of 12 is 0.",
        "Summed over 2 spans, 33% of the size of the edges' scores cancels.",
    ],
    mixer: [
        "mamba2 of layer 3: 50% of the absolute mass of its 2 heads is negative.",
        "L3H1 looks furthest: 3 tokens back on average [3, 3].",
        "Phi v is the layer's own output to 2e-07 of its largest value.",
    ],
    blocks: [
        "By rollout the blocks 1 (from token 4) 0.5, 3 (from token 12) 0.3, 0 (from token 0) 0.1 score highest; the "
        "median block has 0.2.",
        "The score of a block of 4 tokens is approximate: maps of layers are multiplied as means over blocks.",
    ],
    components: [
        "L1H2 on 7 pairs at distance 3: about 1.6 [1.6, 1.6] of 2 components of its query-key map carry the logits, 1.5 "
        "[1.5, 1.5] of 2 of its value-output map what it writes.",
        "query-key: component 0 (singular value 2) carries 75% [75%, 75%] (the largest of 2); all alike would 50%.",
        "value-output: component 1 (singular value 3) carries 80% [80%, 80%] (the largest of 2); all alike would 50%.",
    ],
    retrieval: [
        "Retrieval heads by where they look while the needle is written (literal): L0H1 0.9 [0.9, 0.9], L0H2 0.5 [0.5, "
        "0.5], L0H0 0.1 [0.1, 0.1] come first; the median head has 0.5.",
        "Retrieval heads by how much more the question looks at it (query): L0H0 0.9 [0.9, 0.9], L0H2 0.5 [0.5, 0.5], "
        "L0H1 0.1 [0.1, 0.1] come first; the median head has 0.5.",
        "Retrieval heads by what they bring from it to the answer (output): L0H2 0.9 [0.9, 0.9], L0H0 0.5 [0.5, 0.5], "
        "L0H1 0.1 [0.1, 0.1] come first; the median head has 0.5.",
        "Recall is 0.75 [0.00, 1.00] over 2 trials; without the first 1: literal 0.50 [0.50, 0.50], query 0.25 [0.25, "
        "0.25], output 0.00 [0.00, 0.66]; without random others 0.70 [0.70, 0.70].",
        "Rank correlations of 3 heads: literal and query -1.00, literal and output -0.50, query and output 0.50.",
    ],
    terms: [
        "2 of 4 heads of m change more without a term of position than without content, 2 of them beyond the interval (0.1 of all by chance).",
        "L5H0 rests on position most: without position 60% [60%, 60%] of its attention lies elsewhere, without content "
        "40% [40%, 40%].",
    ],
    aligned: [
        "Of 2 heads L0H0 points best: the strongest key is a label in 75% [75%, 75%] of the labelled rows of 2 prompts; a key at "
        "random in 12%, its keys against the labels of other rows in 25%.",
        "L0H1 goes on as the target does: Kendall's tau of its strongest keys is 0.60 [0.60, 0.60]; the best of 2 heads whose "
        "keys have a random order reaches 0.37.",
    ],
    deleted: [
        "Deleting what rollout scores highest costs the answer 0.400 [0.400, 0.400] of probability, random tokens 0.300 "
        "[0.300, 0.300]; 2 prompts.",
        "With what rollout scores highest alone the answer loses 0.100 [0.100, 0.100], with random tokens alone 0.250 "
        "[0.250, 0.250].",
        "Deleted, no better than random order, as far as 2 prompts tell: raw.",
        "flow is not scored: too long.",
        "A deleted token is the mean embedding at its place, which the model was not trained on.",
    ],
    importance: [
        "No head is told to be worth anything to copying: L0H0 0.4 [-1.2, 4.07], L1H1 0.02 [0.02, 0.02] (the highest of 4, by "
        "ablation (mean), in units of loss, n = 2).",
        "1 of 4 heads has a 95 % interval that leaves out 0 (0.2 by chance).",
        "One head is out at a time, so that what others make up for does not show.",
        "The mean over 2 prompts that stands in for a head is to 1/2 the prompt's own output, so that what is lost is "
        "understated; take more prompts, or baseline='pooled_mean'.",
    ],
    segments: [
        "L1: 3 segments of patches, merged while their middles differ by at most 0.25 nats; the largest hold 67%, 17%, 17% of the picture."
    ],
}


@pytest.mark.parametrize("made", SAID)
def test_numbers_by_hand_are_said_so(made):
    assert list(made().findings()) == SAID[made]


def test_a_capture_of_mixers_says_what_each_says_and_no_check_that_was_not_made():
    first, second = mixer(), mixer(5, np.nan)
    assert MixerCapture((first, second), (), "m", ()).findings() == (
        *first.findings(), *second.findings(),
    )  # fmt: skip
    assert [one.kind for one in second.findings()] == ["sign", "distance"]
    assert second.findings()[1].startswith("L5H1 looks furthest")
    one = replace(first, rows={name: rows[:, :1] for name, rows in first.rows.items()})
    assert one.findings()[1] == "L3H1 looks furthest: 3 tokens back on average."


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        ("leave_one_out", "exact: what the block has as a whole, deleted at once"),
        ("raw", "exact: the sum of its tokens' scores"),
    ],
)
def test_scores_of_blocks_that_are_exact_are_said_to_be(method, limit):
    said = {one.kind: one for one in blocks(method, approximate=False).findings()}
    assert said["limit"] == f"The score of a block of 4 tokens is {limit}."


def test_a_head_points_best_where_the_highest_of_all_is_above_chance():
    """Of 64 heads that point by chance one has an own interval above it."""
    random = np.random.default_rng(0)
    base, n = aligned(), 12
    accuracy = random.binomial(8, 0.2, (64, n)) / 8
    heads = tuple((layer, head) for layer in range(8) for head in range(8))
    measures = {name: np.full((64, n), np.nan) for name in base.per_prompt}
    measures |= {"accuracy": accuracy, "chance": np.full((64, n), 0.2)}
    chance = replace(base, per_prompt=measures, heads=heads)
    row = chance.table().iloc[0]
    assert row["accuracy_low"] > 0.2
    said = chance.findings()[0]
    assert said.startswith(f"Of 64 heads {row['name']} points most, not told apart from chance: ")
    assert "of the labelled rows of 12 prompts; a key at random in 20%." in said
    better = replace(chance, per_prompt=measures | {"accuracy": accuracy / 2 + 0.5}).findings()[0]
    assert f"Of 64 heads {row['name']} points best: " in better
    shuffled = measures | {"accuracy": accuracy / 2 + 0.5, "shuffled": np.full((64, n), 0.8)}
    assert "points most, not told" in replace(chance, per_prompt=shuffled).findings()[0]
    hits = np.tile([1.0, 0, 1, 1], (2, 2))
    one = {name: values[:, :1] for name, values in base.per_prompt.items()}
    assert "rows of one prompt (8); a key" in replace(base, per_prompt=one, hits=hits).findings()[0]


def test_heads_that_are_listed_as_aligning_stand_beside_the_others():
    said = {one.kind: one for one in replace(aligned(), known=(1,)).findings()}
    assert said["known"] == (
        "The head that is listed as aligning points at labels in a share of 0.50, the other 1 0.75: a difference of -0.25 "
        "[-0.25, -0.25]."
    )


def test_an_alignment_without_labels_or_order_names_no_head():
    (alone,) = aligned(accuracy=(np.nan, np.nan)).findings()
    assert (alone.kind, alone[:4]) == ("monotonicity", "L0H1")
    assert [one.kind for one in aligned(tau=(np.nan, np.nan)).findings()] == ["alignment", "limit"]


def test_an_overlay_names_a_patch_where_one_stands_out():
    assert list(overlay([0.1, 0.1], [0.6, 0.1]).findings()) == [
        "L1H2, row 3: most on the patch (1, 0), 2.7 times what a patch of uniform attention has (one picture, no interval).",
        "L1H2, row 3: 1 of 4 patches hold half of it.",
        "L1H2, row 3: 10.0% lies on no patch shown.",
    ]
    even = {one.kind: one for one in overlay([0.2, 0.2], [0.2, 0.2]).findings()}
    assert even["strongest"] == "L1H2, row 3: no patch stands out from uniform attention."
    assert even["half"] == "L1H2, row 3: 2 of 4 patches hold half of it."


def test_an_overlay_of_a_key_says_which_patch_looks_and_not_where_attention_lies():
    back = replace(overlay([0.1, 0.1], [0.6, 0.1]), back=True, what="who looks at “a”")
    assert list(back.findings()) == [
        "L1H2, who looks at “a”: most the patch (1, 0), 2.7 times the mean of the patches that see it (one picture, no interval).",
        "L1H2, who looks at “a”: 1 of 4 patches give half of what it gets from patches.",
    ]
    even = replace(overlay([0.2, 0.2], [0.2, 0.2]), back=True).findings()[0]
    assert even == "L1H2, row 3: no patch looks more than the others that see it."
    left_out = replace(overlay([0.1, np.nan], [0.6, 0.1]), back=True).findings()
    assert (
        left_out[2] == "L1H2, row 3: sinks, which are left out, give it 0.1 rows of attention more."
    )


def test_a_denoiser_is_told_at_its_first_and_last_step(monkeypatch):
    steps = [0, 0, 4, 4, 9, 9]
    rows = pd.DataFrame({"part": "joint", "step": steps, "entropy": [1.0, 2, 9, 9, 3, 4]})
    rows["image_to_text"] = [0.1, 0.3, 0.9, 0.9, 0.5, 0.7]
    rows["text_to_image"] = [0.4, 0.6, 0.9, 0.9, 0.0, 0.2]
    rows = rows.assign(keys=20, text_keys=5)
    monkeypatch.setattr(Denoising, "table", lambda _: rows)
    found = Denoising((0, 4, 9), (9.0, 5.0, 1.0), {("joint", 0): None}, "m", 0.0)
    assert list(found.findings()) == [
        "joint: mass of the picture on the text 20.0% (10.0% to 30.0%) at step 0, 60.0% (50.0% to 70.0%) at step 9; uniform "
        "attention 25.0% (mean and range of 2 heads).",
        "joint: mass of the text on the picture 50.0% (40.0% to 60.0%) at step 0, 10.0% (0.0% to 20.0%) at step 9; uniform "
        "attention 75.0% (mean and range of 2 heads).",
        "joint: entropy of a row, nats, 1.50 (1.00 to 2.00) at step 0, 3.50 (3.00 to 4.00) at step 9; at most 3.00 (mean and "
        "range of 2 heads).",
    ]


def test_estimates_are_said_to_be_and_sizes_are_not_told_from_0():
    kinds = {one.kind: one for one in importance("gradient", "zero", "token").findings()}
    assert list(kinds) == ["top", "limit"]
    assert kinds["top"].startswith("Worth most to copying: L0H0 0.4 [0, 4.07], L1H1 0.02")
    assert kinds["limit"] == "It is an estimate to first order; method='ablation' measures it."


def test_heads_are_worth_most_where_the_highest_of_all_is_told_apart_from_none():
    """Noise in 24 heads has a highest one whose own interval is above 0; heads below 0 are worth nothing."""
    noise = np.random.default_rng(4).normal(size=(4, 6, 8))
    base = importance()
    of_noise = replace(base, per_prompt=noise, clean=np.ones(8))
    assert of_noise.table()["low"].iloc[0] > 0
    said = of_noise.findings()[0]
    assert (said.kind, said[:44]) == ("none", "No head is told to be worth anything to copy")
    (told,) = of_kind(replace(of_noise, per_prompt=noise + 2).findings(), "top")
    assert told.startswith("Worth most to copying: ")
    below = replace(base, per_prompt=-np.abs(base.per_prompt) - 0.01).findings()[0]
    assert below.startswith("No head is told to be worth anything to copying: L1H1 -0.03 [")
    assert below.count("L") == 1
    one = replace(base, per_prompt=base.per_prompt[..., :1], clean=np.ones(1)).findings()[0]
    assert one.startswith("Worth most to copying: L0H0 0.5, L0H1 0.1, L1H1 0.02 (the highest of 4")


def test_of_each_role_the_head_with_most_of_it_is_named_beside_its_baseline(monkeypatch):
    assert list(roles(monkeypatch).findings()) == [
        "Most previous token of 2 heads on 2 prompts: L0H1 0.75 [0.55, 0.95] (above random weights 0.04).",
        "Most induction of 2 heads on 2 prompts: L0H0 0.50 [0.30, 0.70] (above random weights 0.03).",
    ]
    one = replace(roles(monkeypatch), prompts=1).findings()[1]
    assert one == (
        "Most induction of 2 heads on one prompt, intervals over its rows: L0H0 0.50 [0.39, 0.61] (above random weights 0.03)."
    )


def test_no_order_is_told_that_is_none():
    """The head with most of it goes against the target, or its interval holds 0."""
    against = aligned(tau=(-0.2, -0.1)).findings()[1]
    assert against.startswith(
        "No head is told to go on as the target does, L0H1 most: Kendall's tau"
    )
    one = aligned()
    one.per_prompt["monotonicity"][1] = [1.0, -0.1]
    assert one.findings()[1].startswith("No head is told to go on as the target does, L0H1 most")


def test_a_method_is_best_where_it_is_told_apart():
    """Rollout costs most on the mean, and less than random tokens on one of two prompts."""
    one = deleted()
    one.comprehensiveness[1, :, 0] = [0.7, 0.1]
    assert (
        "random tokens 0.300 [0.300, 0.300], not told apart from random, raw; 2 prompts"
        in one.findings()[0]
    )


def test_a_head_rests_on_position_where_it_does_on_every_prompt():
    one = terms()
    one.change[1, 0, 1] = [1.0, 0.2]
    one.change[0, 1, 1] = [0.5, 0.0]
    first, second = one.findings()
    assert "2 of 4 heads" in first
    assert "0 of them beyond the interval" in first
    assert second.endswith("without content 40% [40%, 40%], not told apart.")
