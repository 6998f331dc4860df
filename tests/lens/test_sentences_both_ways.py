"""What results say word for word of numbers by hand, each beside numbers of which they say the contrary, or nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens.common.head_ids import HeadId
from lens.common.results import of_kind
from lens.heads.likeness.redundancy import HeadClusters
from lens.policies.stability import PolicyStability
from lens.policies.transferring import PolicyTransfer
from lens.reading.directions import SubspaceRemovals
from lens.reading.explanations import Explanation, PairExplanation
from lens.reading.mixtures import MixingRatios
from lens.reading.removals import Removals
from lens.reading.robustness import Adversaries
from lens.reading.top_examples import Example, TopExamples
from lens.stats.grouping import Groups
from lens.traces.pictures import PatchGrid
from lens.vision.grounding import Grounding
from lens.vision.structure import PatchTree

HEADS = (HeadId(0, 0), HeadId(0, 1))


def twice(values):
    """[..., 2] of two prompts that are alike."""
    return np.repeat(np.asarray(values, float)[..., None], 2, -1)


def clusters(best=3.2, rand=(), labels=(0, 0, 1, 1)):
    drawn = np.array([0.8, 1.0])
    groups = Groups(np.array(labels), np.zeros((3, 3)), 0.625, drawn, best, np.array([1.5, 2.1]))
    names = ("L0H0", "L0H1", "L1H0", "L1H1")
    medoids = HEADS[:1] * (max(labels) + 1)
    return HeadClusters(
        1.0, np.arange(4), np.ones(4), np.array(rand), groups, medoids, names, "js", "m"
    )


def tree(parents=(-1, 0, 0, 1), adjacent=0.9, chance=0.2, windows=1):
    """Of 4 patches; the depth is that of a chain 0 - 1 - 3 and 0 - 2."""
    grid = PatchGrid(0, 2, 2, np.arange(4), np.zeros((2, 2, 3), np.uint8), (2, 2), (0, 0, 2, 2))
    shape = np.array(parents), np.array([0, 1, 1, 2])
    return PatchTree(*shape, -1.0, -0.5, 3, adjacent, chance, "L0H1", grid, windows)


def examples(random=None, prompts=2, refused=None):
    one = Example(0.75, 0.1, 1, 5, 2, (2, 5), (" the", " cat"), (0.75, 0.25))
    found = {"attention": {HEADS[0]: (one,), HEADS[1]: ()}}
    typical = {"attention": np.full((1, 2, prompts), 0.25)}
    typical["attention"][0, 0] = 0.5
    chance = {} if random is None else {"attention": np.full((1, 2, prompts), random)}
    return TopExamples(found, typical, chance, (0,), prompts, refused or {}, 0, "m")


def stable(efficiency=0.95, lse_error=0.01, repeat=1.0, prompts=3):
    """Conditions "repeat" and "prompt" of one layer of two heads; `lse_error` is of the first head, that of the other 0."""
    again = np.ones((7, prompts, 1, 2))
    other = np.full((7, prompts * (prompts - 1), 1, 2), efficiency)
    again[0], again[5] = repeat, 0
    other[5], other[5, :, :, 0] = 0, lse_error
    return PolicyStability({"repeat": again, "prompt": other}, 0.2, (0,), 0, "m")


def transferred(efficiency=(0.95, 0.75), lse_error=(0.01, 0.2), cached=np.nan):
    """Three traces of one layer of two heads."""
    values = np.full((7, 3, 3, 1, 2), np.nan)
    for place, one in enumerate((0.5, 0.6, 0.8, efficiency, 0.3, lse_error, cached)):
        values[place, ~np.eye(3, dtype=bool)] = one
    return PolicyTransfer(values, 0.2, (0,), 0, "m")


def subspace(left=(0.8, 0.1, 0.5, 0.6, 0.7, 0.75), other=0.4):
    mass, loss = twice(left), twice([1.0, 1.5, 1.2, 1.2, 1.2, 1.1])
    beside = twice([0.5, other, 0.5, 0.5, 0.5, 0.5])
    basis = np.zeros((8, 2)), np.zeros(8)
    return SubspaceRemovals(
        HeadId(1, 2), "induction", "previous", 2, 8, mass, beside, loss, basis[1], basis[0], 0, "m"
    )


def removals(parts=3, prompts=2):
    predicted, measured = np.array([0.2, 0.5, 0.7]), np.array([0.1, 0.6, 0.65])
    both = (np.repeat(one[:parts, None], prompts, 1) for one in (predicted, measured))
    names = ("L0H0", "L0H1", "L0.mlp")[:parts]
    clean = np.full(prompts, 0.75)
    return Removals(HeadId(1, 2), "key", names, "induction pairs", clean, *both, 0, "m")


def grounded(*maps, pictures=2):
    rows = [
        {
            "picture": picture, "map": name, "pointing": pointing, "pointing_blind": 0.25,
            "pointing_middle": 0.5, "iou": iou, "threshold": 0.5, "iou_whole": 0.25, "iou_middle": 0.4,
        }
        for picture in range(pictures)
        for name, pointing, iou in maps
    ]  # fmt: skip
    return Grounding(pd.DataFrame(rows), 0)


def explained(key=3, turned=0.5, slope=1.0, looks=True, error=1e-6, against="keys"):
    """Query parts a, b and key parts c, d; against the average 2.5 of the logit 4."""
    values, contrast = np.array([[2.0, 0.5], [1.0, 0.5]]), np.array([[1.5, -0.25], [0.5, -0.25]])
    content = values - np.array([[turned, 0], [0, 0]])
    sources = ({"a": "' cat' at 1"} if looks else {}, {})
    return Explanation(
        HeadId(1, 2), 7, key, (" the", " dog"), (("a", "b"), ("c", "d")), values, contrast, content,
        4.0, 2.5, against, 0.75, 0.125, slope, sources, error, "m",
    )  # fmt: skip


def pairs(groups=("all",), by="", shares=((0.75, 0.25),), above=2.0, prompts=2):
    """Key parts c, d carry `shares` of what the logit is above the mean, by group; the query's one part all of it."""
    contrast = np.array(shares)[:, None, None] * above * np.ones((1, prompts, 1, 1))
    flat = np.ones((len(groups), prompts))
    return PairExplanation(
        HeadId(1, 2), "induction pairs", groups, "keys", (("a",), ("c", "d")), contrast, contrast,
        contrast, np.abs(contrast), 0.5 * flat, 0.125 * flat, above * flat, np.full(flat.shape, 4), 0.0, 0, "m", by,
    )  # fmt: skip


def mixed(*ratios, prompts=2):
    """One layer."""
    own = np.repeat(np.array(ratios, float)[:, None, None], prompts, 2)
    even = np.repeat(np.array([0.9, 0.6, 0.45, 0.3, 0.2])[:, None, None], prompts, 2)
    return MixingRatios((0,), own, even, 0, "m")


def adversaries(divergence=(0.3, 0.001), free=(4, 0), change=1e-6):
    rows = ((np.ones(2) / 2,) * 2,) * 2
    return Adversaries(
        HEADS, rows, rows, twice(divergence), twice([0.2, 0.2]), np.array([free, free]).T,
        np.zeros((2, 2)), twice([change, change]), twice([0.5, 0.5]), 0, "m",
    )  # fmt: skip


SAID = [
    (
        clusters(),
        [
            "L0H0 L0H1; L1H0 L1H1 (2 groups; adjusted Rand 0.90 on 80% of them, silhouette 0.62; together 3.2 standard deviations over the mean of these and of single normal clouds, above the 2.1 that one of 20 has).",
        ],
    ),
    (
        clusters(best=2.0),
        [
            "no groups are told apart (adjusted Rand 0.90 on 80% of them, silhouette 0.62; together 2.0 standard deviations over the mean of these and of single normal clouds, not above the 2.1 that one of 20 has); cut into 2, the largest are L0H0 L0H1; L1H0 L1H1.",
        ],
    ),
    (
        clusters(rand=(0.5, 0.75)),
        [
            "L0H0 L0H1; L1H0 L1H1 (2 groups; adjusted Rand 0.90 on 80% of them, silhouette 0.62; together 3.2 standard deviations over the mean of these and of single normal clouds, above the 2.1 that one of 20 has; adjusted Rand 0.62 on prompts drawn again).",
        ],
    ),
    (
        clusters(best=2.0, labels=(0, 1, 2, 3)),
        [
            "no groups are told apart (adjusted Rand 0.90 on 80% of them, silhouette 0.62; together 2.0 standard deviations over the mean of these and of single normal clouds, not above the 2.1 that one of 20 has); cut into 4, the largest are no two heads.",
        ],
    ),
    (
        tree(),
        [
            "L0H1: the tree of 4 patches has 1 root and a depth of 2 (mean 1.0); the best parent of each patch alone makes 3 circles.",
            "L0H1: 90.0% [35.8%, 99.3%] of parents are direct neighbours, more than the 20.0% of chance.",
        ],
    ),
    (
        tree(adjacent=0.05, chance=0.8),
        [
            "L0H1: the tree of 4 patches has 1 root and a depth of 2 (mean 1.0); the best parent of each patch alone makes 3 circles.",
            "L0H1: 5.0% [0.2%, 60.4%] of parents are direct neighbours, fewer than the 80.0% of chance.",
        ],
    ),
    (
        tree(adjacent=0.5, chance=0.5, windows=2),
        [
            "L0H1: the tree of 4 patches has 1 root and a depth of 2 (mean 1.0); the best parent of each patch alone makes 3 circles. The picture falls into 2 windows that do not see each other.",
            "L0H1: 50.0% [12.5%, 87.5%] of parents are direct neighbours, not told from the 50.0% of chance.",
        ],
    ),
    (
        tree(parents=(-1, -1, 0, 1)),
        [
            "L0H1: the tree of 4 patches has 2 roots and a depth of 2 (mean 1.0); the best parent of each patch alone makes 3 circles.",
            "L0H1: 90.0% [27.9%, 99.5%] of parents are direct neighbours, more than the 20.0% of chance.",
        ],
    ),
    (
        examples(),
        [
            "By attention L0H0 looks hardest: its strongest pair of a prompt has 0.50 [0.50, 0.50] on average; the best is ' cat' to ' the'.",
        ],
    ),
    (
        examples(random=0.125),
        [
            "By attention L0H0 looks hardest: its strongest pair of a prompt has 0.50 [0.50, 0.50] on average; random weights: 0.12; the best is ' cat' to ' the'.",
        ],
    ),
    (
        examples(prompts=1, refused={"written": "the weights are not known"}),
        [
            "By attention L0H0 looks hardest: its strongest pair of a prompt has 0.50 on average; the best is ' cat' to ' the'.",
            "the weights are not known",
        ],
    ),
    (
        stable(),
        [
            "AdaSpa: the pattern varies from input to input: does not hold here (efficiency 0.950 [0.950, 0.950], beside 0.9).",
            "AdaSpa: the LSE varies from input to input: does not hold here (usable lse 1.000 [1.000, 1.000], beside 0.9).",
            "a search with the LSE of another prompt finds the blocks: holds here (cached efficiency 0.950 [0.950, 0.950], beside 0.9).",
            "The same prompt again: overlap 1.000, LSE usable in 100% of the heads. With the best 20% of the blocks of each row.",
        ],
    ),
    (
        stable(efficiency=0.5, lse_error=0.2),
        [
            "AdaSpa: the pattern varies from input to input: holds here (efficiency 0.500 [0.500, 0.500], beside 0.9).",
            "AdaSpa: the LSE varies from input to input: holds here (usable lse 0.500 [0.500, 0.500], beside 0.9).",
            "a search with the LSE of another prompt finds the blocks: does not hold here (cached efficiency 0.500 [0.500, 0.500], beside 0.9).",
            "The same prompt again: overlap 1.000, LSE usable in 100% of the heads. With the best 20% of the blocks of each row.",
        ],
    ),
    (
        stable(repeat=0.5, prompts=2),
        [
            "AdaSpa: the pattern varies from input to input: cannot be told here (efficiency 0.950, beside 0.9).",
            "AdaSpa: the LSE varies from input to input: cannot be told here (usable lse 1.000, beside 0.9).",
            "a search with the LSE of another prompt finds the blocks: cannot be told here (cached efficiency 0.950, beside 0.9).",
            "The same prompt again: overlap 0.500, LSE usable in 100% of the heads. With the best 20% of the blocks of each row.",
        ],
    ),
    (
        transferred(),
        [
            "The best 20% of the blocks of one trace keep 60.0% of the attention of another, 85.0% [85.0%, 85.0%] of what its own best keep (80.0%); as many random ones 30.0%. Overlap above chance 0.50.",
            "1 of 2 heads keep less than 90 % of that, with the whole interval: L0H1; their pattern has to be looked for anew.",
            "The LSE of another trace is usable (99 % of rows within 5%) in 1 of 2 heads.",
        ],
    ),
    (
        transferred(efficiency=(0.95, 0.9), lse_error=(0.01, 0.049)),
        [
            "The best 20% of the blocks of one trace keep 60.0% of the attention of another, 92.5% [92.5%, 92.5%] of what its own best keep (80.0%); as many random ones 30.0%. Overlap above chance 0.50.",
            "The LSE of another trace is usable (99 % of rows within 5%) in 2 of 2 heads.",
        ],
    ),
    (
        transferred(cached=0.98),
        [
            "The best 20% of the blocks of one trace keep 60.0% of the attention of another, 85.0% [85.0%, 85.0%] of what its own best keep (80.0%); as many random ones 30.0%. Overlap above chance 0.50.",
            "1 of 2 heads keep less than 90 % of that, with the whole interval: L0H1; their pattern has to be looked for anew.",
            "The LSE of another trace is usable (99 % of rows within 5%) in 1 of 2 heads.",
            "Blocks that are searched with the LSE of another trace keep 98.0% [98.0%, 98.0%] of what as many of the best keep.",
        ],
    ),
    (
        transferred(lse_error=(0.3, 0.2)),
        [
            "The best 20% of the blocks of one trace keep 60.0% of the attention of another, 85.0% [85.0%, 85.0%] of what its own best keep (80.0%); as many random ones 30.0%. Overlap above chance 0.50.",
            "1 of 2 heads keep less than 90 % of that, with the whole interval: L0H1; their pattern has to be looked for anew.",
            "The LSE of another trace is usable (99 % of rows within 5%) in 0 of 2 heads.",
        ],
    ),
    (
        subspace(),
        [
            "L1H2 gives 'induction' pairs 80.0%; without 2 of 8 directions of its queries, found by contrast on other prompts, 10.0% [10.0%, 10.0%], without as many random ones 75.0% [75.0%, 75.0%].",
            "As many principal components of its queries leave 50.0% [50.0%, 50.0%], of its keys 60.0% [60.0%, 60.0%], another head's contrast 70.0% [70.0%, 70.0%]: the drop alone is larger than that of every control.",
            "The same removal takes its 'previous' pairs from 50.0% to 40.0% [40.0%, 40.0%], random directions to 50.0% [50.0%, 50.0%]; the loss at these queries changes by +0.5 [+0.5, +0.5] nats, without random directions by +0.1 [+0.1, +0.1].",
        ],
    ),
    (
        subspace(left=(0.8, 0.5, 0.5, 0.6, 0.7, 0.75)),
        [
            "L1H2 gives 'induction' pairs 80.0%; without 2 of 8 directions of its queries, found by contrast on other prompts, 50.0% [50.0%, 50.0%], without as many random ones 75.0% [75.0%, 75.0%].",
            "As many principal components of its queries leave 50.0% [50.0%, 50.0%], of its keys 60.0% [60.0%, 60.0%], another head's contrast 70.0% [70.0%, 70.0%]: the drop alone is not told apart from that of every control on 2 prompts.",
            "The same removal takes its 'previous' pairs from 50.0% to 40.0% [40.0%, 40.0%], random directions to 50.0% [50.0%, 50.0%]; the loss at these queries changes by +0.5 [+0.5, +0.5] nats, without random directions by +0.1 [+0.1, +0.1].",
        ],
    ),
    (
        subspace(other=np.nan),
        [
            "L1H2 gives 'induction' pairs 80.0%; without 2 of 8 directions of its queries, found by contrast on other prompts, 10.0% [10.0%, 10.0%], without as many random ones 75.0% [75.0%, 75.0%].",
            "As many principal components of its queries leave 50.0% [50.0%, 50.0%], of its keys 60.0% [60.0%, 60.0%], another head's contrast 70.0% [70.0%, 70.0%]: the drop alone is larger than that of every control.",
        ],
    ),
    (
        removals(),
        [
            "L1H2 gives induction pairs 75.0%; without what L0H0 wrote on the key side 10.0% [10.0%, 10.0%] (predicted 20.0% [20.0%, 20.0%]); without one of the others 62.5% (median).",
            "Over 3 parts predictions are off by 8.3% [8.3%, 8.3%] of a row on average, rank correlation 1.00; most for L0H0 (20.0% predicted, 10.0% measured).",
        ],
    ),
    (
        removals(parts=2, prompts=1),
        [
            "L1H2 gives induction pairs 75.0%; without what L0H0 wrote on the key side 10.0% (predicted 20.0%); without one of the others 60.0% (median).",
            "Over 2 parts predictions are off by 10.0% of a row on average; most for L0H0 (20.0% predicted, 10.0% measured).",
        ],
    ),
    (
        grounded(("L0H0", 1, 0.6), ("L0H1", 0, 0.75)),
        [
            "L0H0, the best of 2, points into a box in 100% [25%, 100%] of 2 pictures; a blind point does in 25%, the middle in 50%.",
            "L0H1, the best of 2, covers the boxes best: IoU 0.75 [0.75, 0.75] at the best threshold of each picture; the whole picture has 0.25, patches round its middle 0.40.",
        ],
    ),
    (
        grounded(("L0H0", 0, 0.1), pictures=1),
        [
            "L0H0 points into a box in 0% [0%, 79%] of 1 picture; a blind point does in 25%, the middle in 50%.",
            "L0H0 covers the boxes best: IoU 0.10 at the best threshold of each picture; the whole picture has 0.25, patches round its middle 0.40.",
        ],
    ),
    (
        explained(),
        [
            "L1H2: ' the' at 7 gives ' dog' at 3 75.0% of its attention (even attention 12.5%); the logit is 4, +1.5 against the mean over the keys that it sees.",
            "On the key side c carries +2, 133% of it.",
            "On the query side a (from there it looks at ' cat' at 1) carries +1.25, 83% of it.",
            "The largest product is a × c: +1.5.",
            "At one place the logit would be 3.5; the distance adds +0.5.",
        ],
    ),
    (
        explained(key=None, turned=0, slope=0.5, looks=False, error=2, against="attention"),
        [
            "L1H2: ' the' at 7 gives its learned sink 75.0% of its attention (even attention 12.5%); the logit is 4, +1.5 against the mean over the keys that it sees, weighted by its attention.",
            "On the key side c carries +2.",
            "On the query side a carries +1.25.",
            "The largest product is a × c: +1.5.",
            "The logit is that before the softcap, of which 50% of a small change gets through.",
        ],
    ),
    (
        explained(against=0),
        [
            "L1H2: ' the' at 7 gives ' dog' at 3 75.0% of its attention (even attention 12.5%); the logit is 4, +1.5 against the key at 0.",
            "On the key side c carries +2, 133% of it.",
            "On the query side a (from there it looks at ' cat' at 1) carries +1.25, 83% of it.",
            "The largest product is a × c: +1.5.",
            "At one place the logit would be 3.5; the distance adds +0.5.",
        ],
    ),
    (
        pairs(),
        [
            "L1H2 on induction pairs: 8 pairs in 2 prompts get 50.0% [50.0%, 50.0%] of their row's attention (even attention 12.5%); logits are +2 [+2, +2] against the mean over the keys that it sees.",
            "L1H2: on the key side c carries 75% [75%, 75%] of that, the next, d, 25% [25%, 25%].",
            "L1H2: on the query side a carries 100% [100%, 100%] of that.",
        ],
    ),
    (
        pairs(prompts=1),
        [
            "L1H2 on induction pairs: 4 pairs in 1 prompt get 50.0% of their row's attention (even attention 12.5%); logits are +2 against the mean over the keys that it sees.",
            "L1H2: on the key side c carries 75% of that, the next, d, 25%.",
            "L1H2: on the query side a carries 100% of that.",
        ],
    ),
    (
        pairs(above=-2.0),
        [
            "L1H2 on induction pairs: 8 pairs in 2 prompts get 50.0% [50.0%, 50.0%] of their row's attention (even attention 12.5%); logits are -2 [-2, -2] against the mean over the keys that it sees.",
            "L1H2: on the key side c carries 75% of that, the next, d, 25%.",
            "L1H2: on the query side a carries 100% of that.",
        ],
    ),
    (
        pairs(by="class"),
        [
            "L1H2: all pairs are of one group, all.",
            "L1H2 on induction pairs: 8 pairs in 2 prompts get 50.0% [50.0%, 50.0%] of their row's attention (even attention 12.5%); logits are +2 [+2, +2] against the mean over the keys that it sees.",
            "L1H2: on the key side c carries 75% [75%, 75%] of that, the next, d, 25% [25%, 25%].",
            "L1H2: on the query side a carries 100% [100%, 100%] of that.",
        ],
    ),
    (
        pairs(("1", "2"), "offset", ((0.75, 0.25), (0.875, 0.125))),
        [
            "L1H2 on induction pairs by offset, key side: c carries most in 2 of 2 groups with logits above the mean in all of their prompts, two or more, 75% [75%, 75%] (1) to 88% [88%, 88%] (2) of the logit; the median of the others 18.8%.",
            "L1H2 on induction pairs by offset, query side: a carries most in 2 of 2 groups with logits above the mean in all of their prompts, two or more, 100% [100%, 100%] (1) to 100% [100%, 100%] (2) of the logit; there is no other.",
        ],
    ),
    (
        pairs(("1", "2", "3"), "offset", ((0.75, 0.25), (0.875, 0.125), (0.25, 0.75))),
        [
            "L1H2 on induction pairs by offset, key side: c carries most in 2 of 3 groups with logits above the mean in all of their prompts, two or more, 75% [75%, 75%] (1) to 88% [88%, 88%] (2) of the logit; the median of the others 18.8%.",
            "L1H2 on induction pairs by offset, key side: another part leads in 1, surely d (3).",
            "L1H2 on induction pairs by offset, query side: a carries most in 3 of 3 groups with logits above the mean in all of their prompts, two or more, 100% [100%, 100%] (1) to 100% [100%, 100%] (3) of the logit; there is no other.",
        ],
    ),
    (
        pairs(("1", "2"), "offset", ((0.75, 0.25),) * 2, above=-2.0),
        [
            "L1H2 on induction pairs by offset, key side: no group has logits above the mean in all of its prompts, two or more.",
            "L1H2 on induction pairs by offset, query side: no group has logits above the mean in all of its prompts, two or more.",
        ],
    ),
    (
        mixed(0.8, 0.5, 0.4, 0.25, 0.125),
        [
            "By attention weights other tokens bring 80.0% [80.0%, 80.0%] (even attention 90.0%) of what a token becomes, by the sizes of what is written 50.0% [50.0%, 50.0%] (even attention 60.0%).",
            "With the residual stream and its norm that is 12.5% [12.5%, 12.5%] (even attention 20.0%): less than weights say.",
        ],
    ),
    (
        mixed(0.8, 0.5, 0.4, 0.25, np.nan),
        [
            "By attention weights other tokens bring 80.0% [80.0%, 80.0%] (even attention 90.0%) of what a token becomes, by the sizes of what is written 50.0% [50.0%, 50.0%] (even attention 60.0%).",
            "With the residual stream that is 25.0% [25.0%, 25.0%] (even attention 30.0%): less than weights say.",
        ],
    ),
    (
        mixed(0.2, 0.5, 0.4, 0.25, np.nan),
        [
            "By attention weights other tokens bring 20.0% [20.0%, 20.0%] (even attention 90.0%) of what a token becomes, by the sizes of what is written 50.0% [50.0%, 50.0%] (even attention 60.0%).",
            "With the residual stream that is 25.0% [25.0%, 25.0%] (even attention 30.0%): not surely less than weights say.",
        ],
    ),
    (
        mixed(0.8, 0.5, 0.4, 0.25, 0.125, prompts=1),
        [
            "By attention weights other tokens bring 80.0% (even attention 90.0%) of what a token becomes, by the sizes of what is written 50.0% (even attention 60.0%).",
            "With the residual stream and its norm that is 12.5% (even attention 20.0%): not surely less than weights say.",
        ],
    ),
    (
        adversaries(),
        [
            "L0H0: a row of attention that differs by 0.3 [0.3, 0.3] nats (at most 0.69) writes the same, and changes the answer's loss by 0.0000; even attention differs by 0.2 [0.2, 0.2] and changes it by +0.5 [+0.5, +0.5].",
            "No row that differs by 0.01 nats and writes the same was found for L0H1: there are no more keys than values and the sum leave free.",
        ],
    ),
    (
        adversaries(divergence=(0.3, 0.2), change=0.25),
        [
            "L0H0: a row of attention that differs by 0.3 [0.3, 0.3] nats (at most 0.69) writes the same, and changes the answer's loss by +0.2500 [+0.2500, +0.2500]; even attention differs by 0.2 [0.2, 0.2] and changes it by +0.5 [+0.5, +0.5].",
            "L0H1: a row of attention that differs by 0.2 [0.2, 0.2] nats (at most 0.69) writes the same, and changes the answer's loss by +0.2500 [+0.2500, +0.2500]; even attention differs by 0.2 [0.2, 0.2] and changes it by +0.5 [+0.5, +0.5].",
        ],
    ),
    (
        adversaries(divergence=(0.001, 0.002), free=(4, 0)),
        [
            "No row that differs by 0.01 nats and writes the same was found for L0H0, L0H1.",
        ],
    ),
]
"""A result, and all that it says."""


@pytest.mark.parametrize(("found", "said"), SAID)
def test_what_is_said_and_what_is_not(found, said):
    assert list(found.findings()) == said


def test_a_change_of_0_on_average_keeps_an_interval_that_is_wide():
    """It was told as 0.0000 alone, as if it were 0 on every prompt."""
    found = replace(adversaries(), change=np.array([[0.1, -0.1], [0.0, 0.0]]))
    assert "the answer's loss by +0.0000 [-0.9168, +0.9168]; even" in found.findings()[0]


def test_the_part_that_costs_most_has_the_interval_of_the_lowest_of_all():
    measured = removals().measured.copy()
    measured[0] = [0.05, 0.15]
    assert (
        "key side 10.0% [0.0%, 100.0%] (predicted"
        in replace(removals(), measured=measured).findings()[0]
    )


def test_orders_at_random_stand_beside_many_parts():
    names = tuple(f"L0H{head}" for head in range(6))
    parts = twice(np.arange(6) / 10)
    found = replace(removals(), parts=names, predicted=parts, measured=parts)
    (said,) = of_kind(found.findings(), "agreement")
    assert "rank correlation 1.00 (95 of 100 orders at random: within ±0.88)" in said
