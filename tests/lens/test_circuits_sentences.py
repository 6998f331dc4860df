"""What results of circuits say, word by word, and what they say where it would be the opposite."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens.circuits.checks._sink_check import SinkCheck
from lens.circuits.patches.head_parts import ROLES, JoinedHeads
from lens.circuits.reuse._overlap import Overlap
from lens.circuits.reuse._redirection import Redirection, _judged
from lens.circuits.scores._sae_codes import CodeScores, CodeSettings
from lens.common.head_ids import HeadId
from lens.common.results import of_kind

HEADS = (HeadId(0, 1), HeadId(1, 0))


def kinds(result):
    return [said.kind for said in result.findings()]


def one(result, kind):
    (said,) = of_kind(result.findings(), kind)
    return said.text


@pytest.fixture
def overlap():
    """Two of the three heads that either circuit has are in both; by chance a quarter."""
    first, second = np.zeros((2, 2, 3), bool)
    first[0, 1] = first[1, 0] = second[0, 1] = second[1, 0] = second[1, 2] = True
    values = {"heads": 2 / 3, "rank correlation": 0.5}
    null = {"heads": np.array([0.25, 0.2, 0.3]), "rank correlation": np.array([0.1, 0.2, 0.6])}
    blank = np.full((2, 3), np.nan)
    return Overlap(values, null, {}, first, second, (blank, blank), ("ioi", "induction"), "layers")


def test_overlap(overlap):
    assert kinds(overlap) == ["shared", "orders", "limit"]
    assert one(overlap, "shared") == (
        "ioi and induction share 2 of 3 heads (Jaccard 0.67; heads of the same layers at random 0.25 "
        "[0.20, 0.30], p 0.25)."
    )
    assert one(overlap, "orders") == (
        "All scores put in order agree to 0.50 (Spearman; 0.30 [0.11, 0.58] by chance, p 0.5)."
    )
    swapped = replace(
        overlap, null={**overlap.null, "heads": np.array([0.9, 0.8, 0.7])}, kind="all"
    )
    assert "heads of any layer at random 0.80 [0.70, 0.90], p 1)" in one(swapped, "shared")
    below = replace(
        overlap,
        resampled={"heads": np.array([0.2, 0.3, 0.4]), "rank correlation": np.array([0.1, 0.2])},
    )
    assert "(Jaccard 0.67, of redrawn prompts 0.21 to 0.40; heads" in one(
        below, "shared"
    )  # 0.67 is outside of what read as its interval
    assert "agree to 0.50, of redrawn prompts 0.10 to 0.20 (Spearman" in one(below, "orders")
    alone = replace(overlap, values={"heads": 2 / 3})
    assert kinds(alone) == ["shared", "limit"]
    table = overlap.heads()
    assert table[["name", "layer", "head", "circuit"]].to_numpy().tolist() == [
        ["L0H1", 0, 1, "both"], ["L1H0", 1, 0, "both"], ["L1H2", 1, 2, "second"],
    ]  # fmt: skip


@pytest.fixture
def redirection():
    """As it is 2 of 8 prompts are right, redirected all, with either control 2."""
    wrong, right = [1.0, 0, 0, 0] * 2, [1.0] * 8
    runs = np.array([wrong, right, wrong, wrong])
    controls = ((HeadId(0, 0), HeadId(1, 2)), (HeadId(0, 2), HeadId(1, 1)))
    return Redirection(
        HEADS, controls, runs, 2 - runs, np.full((2, 8), 0.05), "answer", 1.0, "equal", "layers", "loss",
        -1, "broken", "m", 0,
    )  # fmt: skip


def test_redirection(redirection):
    assert kinds(redirection) == ["effect", "controls", "metric"]
    effect = one(redirection, "effect")
    assert effect.startswith(
        "With 100% of the attention of L0H1, L1H0 on answer, accuracy on broken goes from 25.0% to 100.0% "
        "(+75.0% ["
    )
    assert effect.endswith("the heads repair the task.")
    assert one(redirection, "controls").startswith(
        "As many heads of the same layers at random (2 draws) give 25.0%; the difference is +75.0% ["
    )
    assert "p 0.33. Before, the heads had 5.0% of their attention there." in one(
        redirection, "controls"
    )
    assert one(redirection, "metric").startswith("The loss goes from 1.75 to 1 (-0.75 [")
    undone = replace(redirection, accuracy=redirection.accuracy[[1, 0, 2, 3]], match="all")
    assert one(undone, "effect").endswith(
        "accuracy falls, not told apart from what it does with other heads."
    )
    alone = _judged(-0.1, np.nan, np.nan)
    assert (
        alone == "accuracy falls, and one prompt tells nothing beside what it does with other heads"
    )
    better = redirection.accuracy.copy()
    better[2:] = better[1]  # other heads repair it as well
    assert one(replace(redirection, accuracy=better), "effect").endswith(
        "accuracy rises, not told apart from what it does with other heads."
    )
    harmed = replace(redirection, accuracy=better[[1, 0, 2, 3]])
    assert one(harmed, "effect").endswith("the heads harm the task.")
    some = np.array([[0.0] * 8, [1.0] * 4 + [0] * 4, [1.0] * 8, [1.0] * 8])
    more = replace(redirection, accuracy=some, metric=2 - some, mass=np.full((2, 8), 0.05))
    assert one(more, "effect").endswith("accuracy rises, but more with other heads.")
    assert "As many heads of any layer" in one(undone, "controls")
    same = replace(redirection, accuracy=redirection.accuracy[[0, 0, 2, 3]])
    assert one(same, "effect").endswith("the interval holds 0.")
    single = replace(redirection, accuracy=redirection.accuracy[:, 1:2], metric=np.ones((4, 1)))
    assert one(single, "effect").endswith("(+100.0%): one prompt has no interval.")
    assert "nan" not in " ".join(single.findings())


def test_sink_check():
    plain = np.array([2.0, 4.0])
    check = SinkCheck(
        HEADS,
        plain,
        {"excluded": plain - 1, "redistributed": plain + 0.5},
        {"excluded": plain[None] - [[0.25], [0.75]], "redistributed": plain[None]},
        1,
        "logit_difference",
        "ioi",
        "m",
        0,
    )
    assert kinds(check) == ["excluded", "redistributed"]
    assert one(check, "excluded") == (
        "With the first key excluded in 2 heads, ioi goes from 3 to 2 in logit_difference, a gain of -1 [-1, -1] (below 0 it "
        "goes worse); in 1 other of the same layers of -0.5 [-0.5, -0.5]."
    )
    assert "2 heads, ioi goes from 3 to 3.5 in logit_difference, a gain of +0.5" in one(
        check, "redistributed"
    )
    loss = replace(check, plain=-plain, edited=dict.fromkeys(check.edited, -plain - 1), sign=-1)
    assert "goes from 3 to 4 in logit_difference, a gain of -1 [" in one(loss, "excluded")
    assert loss.table()["value"].iloc[0] == 4
    alone = replace(check, others={name: np.empty((0, 2)) for name in check.others})
    assert one(alone, "excluded").endswith("(below 0 it goes worse).")


def test_codes():
    settings = CodeSettings(4, 9, 0.1, 2, "mean", (0, 1))
    counts = np.array([[[3, 0], [1, 0]], [[5, 0], [0, 0]]], float)
    scores = CodeScores(counts, 7, settings, "ioi", "m")
    assert kinds(scores) == ["codes", "limit"]
    assert one(scores, "codes") == (
        "Most codes that clean prompts alone use: L0H0 4 (± 1.4 over seeds), L1H0 0.5 (± 0.71 over seeds), L0H1 0 "
        "(± 0 over seeds), the median head 0.25 (7 held-out pairs of prompts of ioi, 2 seeds); 2 of 4 heads have none."
    )
    nothing = replace(scores, per_seed=counts * 0)
    assert kinds(nothing) == ["codes"]
    assert one(nothing, "codes") == (
        "No head has a code that clean prompts alone use (7 held-out pairs of prompts of ioi, 2 seeds)."
    )


def test_parts_of_heads():
    parts = np.array([[4.0, 1, 3, 0, 2], [-1.0, -2, 0.5, 0.5, 0]])  # [head, part]
    effects = np.stack([parts, parts], -1)
    effects[1, 0] = [-3, 1]  # its sign depends on the prompt
    roles = pd.DataFrame({"name": ["L0H1", "L1H0"], **{role: [0.25, 0.5] for role in ROLES}})
    attended = pd.DataFrame(
        [("L0H1", 0, 0, 3, "Mary", 0.8), ("L0H1", 1, 0, 3, "Mary", 0.6),
         ("L1H0", 0, 0, 0, "BOS", 0.9), ("L1H0", 1, 0, 2, "to", 0.1), ("L1H0", 0, 1, 1, "to", 0.0)],
        columns=["name", "prompt", "rank", "position", "token", "mass"],
    )  # fmt: skip
    first = np.array([[0.1, 0.3], [0.9, 0.0]])
    joined = JoinedHeads(HEADS, effects, roles, attended, first, np.ones(2), "loss", "ioi", "m", 0)
    assert one(joined, "effect") == (
        "L0H1: effect +4 [+4, +4] loss, more through its values than its pattern (pattern +1 [+1, +1], value +3 [+3, +3], "
        "interaction +0 [+0, +0]); its last answer's row looks most at 'Mary' in 2 of 2 prompts (with 70% of it) and has 20% on the first "
        "key, mean of all; without the first key the effect is +2 [+2, +2]."
    )
    assert "most at 'BOS' in 1 of 2 prompts (with 90% of it)" in one(joined, "none")
    assert one(joined, "none").endswith("has 45% on the first key, mean of all.")
    assert one(joined, "none").startswith(
        "L1H0: effect -1 [-19.3, +17.3], the interval holds 0; its last"
    )
    apart = effects.copy()
    apart[0, 1:3] = [[3, -1], [0, 6]]  # by the means more through its values
    assert (
        "through its pattern or its values, which are not told apart (pattern +1 [-17.3, +19.3], value +3 [+0, +30.5]"
        in one(replace(joined, effects=apart), "effect")
    )
    turned = replace(joined, effects=effects[:, [0, 2, 1, 3, 4]])
    assert "more through its pattern than its values" in one(turned, "effect")
    both = effects.copy()
    both[0] = np.array([1.0, -0.5, 0.1, 1.4, 0])[:, None]  # neither alone does any of it
    said = one(replace(joined, effects=both), "effect")
    assert "+1] loss, more by both together than by either alone (pattern -0.5" in said
    both[0, 1:4] = [
        [-0.5, 0.5],
        [0.1, 0.1],
        [1.4, 0.4],
    ]  # in one of the prompts its pattern does more
    said = one(replace(joined, effects=both), "effect")
    assert "through its pattern or its values, which are not told apart (pattern +0" in said
    (said, _) = replace(
        joined, effects=effects[..., :1], clean=np.ones(1), first_key=first[:, :1]
    ).findings()
    assert "(one prompt, no interval) loss (pattern +1, value +3" in said
    assert [said.kind for said in joined.findings(most=1)] == ["effect"]
    table = joined.table()
    assert table[["name", "layer", "head"]].to_numpy().tolist() == [["L0H1", 0, 1], ["L1H0", 1, 0]]
