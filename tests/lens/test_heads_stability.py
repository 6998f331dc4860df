"""Stability of heads: closed forms, chance level, a prompt against itself, real heads, refusals."""

import numpy as np
import pytest

import lens
from lens.common.errors import LensError
from lens.heads.likeness.stability import HeadStability, map_scores, stability
from tests.lens.encoder_decoders import inputs_of, made
from tests.lens.traces import probabilities, trace_of

METRICS = {"jaccard", "jaccard_uniform", "recall", "efficiency", "js", "correlation"}
ALL = np.ones((7, 7), bool)


def test_a_prompt_against_itself_is_stable_and_other_prompts_vary():
    p, q = (probabilities(2, 3, 67, seed) for seed in (0, 1))
    same = stability({"a": [trace_of(p)], "b": [trace_of(p)]})
    for (_, _, metric, _), values in same.values.items():
        if metric in ("jaccard", "efficiency", "correlation"):
            assert values == pytest.approx(1), metric
        elif metric not in ("recall", "jaccard_uniform"):
            assert values == pytest.approx(0, abs=1e-7), metric
    assert same.reusable("a", "b").all()
    other = stability({"a": [trace_of(p)], "b": [trace_of(q)]})
    assert (other.values["a", "b", "correlation", "sink_excluded"] < 0.999).all()
    assert not other.reusable("a", "b").any()
    assert (other.values["a", "b", "js", "raw"] > 0).all()


def test_scores_in_closed_form():
    """Four blocks, top two: a takes 0 and 1, b takes 1 and 2."""
    allowed = np.array([[True, True], [True, True]])
    a = np.array([[0.6, 0.4], [0.3, 0.1]])
    b = np.array([[0.2, 0.5], [0.4, 0.1]])
    found = map_scores(a, b, allowed, 0.5)
    by_chance = 0.5 / 1.5
    assert found["jaccard"] == pytest.approx((1 / 3 - by_chance) / (1 - by_chance))
    assert found["recall"] == pytest.approx(0.7 / 1.2)
    assert found["efficiency"] == pytest.approx(0.7 / 0.9)
    ranks_a, ranks_b = [4, 3, 2, 1], [2, 4, 3, 1]
    assert found["correlation"] == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])
    js = []
    for x, y in zip(a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True), strict=True):
        m = (x + y) / 2
        js.append((x * np.log(x / m) + y * np.log(y / m)).sum() / 2)
    assert found["js"] == pytest.approx(np.mean(js))
    back = map_scores(b, a, allowed, 0.5)
    assert back["recall"] == pytest.approx(0.7 / 1.4)
    assert back["jaccard"] == found["jaccard"]


def test_random_sets_share_no_more_than_by_chance():
    random = np.random.default_rng(0)
    found = [
        map_scores(random.random((23, 23)), random.random((23, 23)), np.ones((23, 23), bool), 0.2)
        for _ in range(200)
    ]
    assert abs(np.mean([one["jaccard"] for one in found])) < 0.01
    assert abs(np.mean([one["correlation"] for one in found])) < 0.01


def test_no_mass_and_no_order_are_not_scored():
    nothing, flat = np.zeros((7, 7)), np.full((7, 7), 1 / 7)
    found = map_scores(flat, nothing, ALL, 0.2)
    for metric in ("recall", "efficiency", "js", "correlation"):
        assert np.isnan(found[metric]), metric


def test_sink_and_diagonal_are_left_out():
    """Heads that differ only in the first key block and on the diagonal are the same without them."""
    base = np.random.default_rng(1).random((7, 7))
    changed = base.copy()
    changed[:, 0], changed[np.arange(7), np.arange(7)] = 9, 5
    row, column = np.mgrid[:7, :7]
    rest = (column < row) & (column > 0)
    assert map_scores(base, changed, rest, 0.3)["jaccard"] == 1
    assert map_scores(base, changed, column <= row, 0.3)["jaccard"] < 1


def near_uniform(seed, window=None, length=256, spread=0.05):
    """[1, 3, length, length] causal attention that is uniform up to a little noise."""
    i, j = np.arange(length)[:, None], np.arange(length)
    seen = (j <= i) & (i - j < (window or length))
    p = np.where(
        seen, np.exp(np.random.default_rng(seed).normal(0, spread, (1, 3, length, length))), 0
    )
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("window", [None, 96])
def test_blocks_that_the_mask_alone_makes_strong_are_told_apart_from_a_pattern(window):
    """Nearly uniform heads share far more blocks than random sets do, and no more than with uniform attention."""
    options = {"windows": [window]}
    traces = [trace_of(near_uniform(seed, window), **options) for seed in range(8)]
    found = stability({"a": traces[:4], "b": traces[4:]})
    for variant in ("raw", "sink_excluded"):
        shared, even = (
            found.values["a", "b", name, variant] for name in ("jaccard", "jaccard_uniform")
        )
        assert even.mean() > 0.3
        assert shared.mean() == pytest.approx(even.mean(), abs=0.1)
    said = found.findings()[0]
    assert "3 of 3 heads share more" in said
    assert "0 of 3 more than with uniform attention (the median head" in said
    random = np.random.default_rng(0).normal(0, 3, (256, 256))
    own = np.stack([near_uniform(seed, window)[0] for seed in range(8)]) * np.exp(random)
    own /= own.sum(-1, keepdims=True)
    traces = [trace_of(p[None], **options) for p in own]
    found = stability({"a": traces[:4], "b": traces[4:]})
    assert "3 of 3 more than with uniform attention" in found.findings()[0]


def test_uniform_attention_shares_all_with_itself_and_nothing_where_all_blocks_tie():
    flat, causal = np.full((1, 1, 256, 256), 1 / 256), near_uniform(0, spread=0)
    options = {"windows": [None]}
    for p, looks_back, expected in ((flat, False, 0), (causal, True, 1)):
        trace = trace_of(p, causal=looks_back, **options)
        found = stability({"a": [trace], "b": [trace]}, density=2 / 136)  # the causal ones: no tie
        assert found.values["a", "b", "jaccard_uniform", "raw"] == pytest.approx(expected, abs=2e-2)


def test_blocks_that_a_window_hides_are_no_place_to_agree_on():
    """Of 16 rows of blocks a window of one block shows two each: a fifth of 31 blocks are 6."""
    p, q = near_uniform(0, 17, spread=1), near_uniform(1, 17, spread=1)
    one, other = (trace_of(x, windows=[17]) for x in (p, q))
    found = stability({"a": [one], "b": [other]}, density=0.2)
    seen = one.dataset["block_mass"].values[0, 0] > 0
    assert int(seen.sum()) == 31
    expected = map_scores(*(t.dataset["block_mass"].values[0, 0] for t in (one, other)), seen, 0.2)
    for metric in ("jaccard", "correlation"):
        assert found.values["a", "b", metric, "raw"][0, 0] == pytest.approx(expected[metric])


def shifted(trace, by):
    changed = trace.dataset.copy()
    changed["lse"] = changed["lse"] + by
    return lens.traces.AttentionTrace(changed)


def test_drift_of_the_lse_in_closed_form():
    p = probabilities(1, 2, 33, 0)
    trace = trace_of(p)
    found = stability({"old": [trace], "new": [shifted(trace, 0.5)]})
    forward = {key[2]: values for key, values in found.values.items() if key[0] == "old"}
    assert forward["drift"] == pytest.approx(0.5, abs=1e-6)
    assert forward["drift_std"] == pytest.approx(0, abs=1e-6)
    assert forward["drift_p99"] == pytest.approx(0.5, abs=1e-6)
    assert forward["mass_error_p99"] == pytest.approx(np.exp(0.5) - 1, abs=1e-6)
    assert found.values["new", "old", "drift", "raw"] == pytest.approx(-0.5, abs=1e-6)
    assert not found.reusable("old", "new").any()
    close = stability({"old": [trace], "new": [shifted(trace, 0.01)]})
    assert close.reusable("old", "new").all()


def test_positional_heads_are_stable_over_prompts_and_induction_heads_are_not():
    model = lens.load("induction-2l")

    def traces(seed):
        prompts = []
        for number in range(3):
            random = np.random.default_rng([seed, number])
            segment = random.integers(0, 64, 12)
            gap = random.integers(0, 64, int(random.integers(10, 25)))
            prompt = [64, *segment, *gap, *segment]
            prompts.append([*prompt, *random.integers(0, 64, 61 - len(prompt))])
        return lens.capture(model, [[int(i) for i in ids] for ids in prompts], block_size=4)

    found = stability({"a": traces(1), "b": traces(2)})
    table = found.table()
    chosen = table[
        (table["metric"] == "js") & (table["variant"] == "raw") & (table["first"] == "a")
    ]
    js = chosen.set_index(["layer", "head"])["value"]
    assert js[0, 1] < 0.01  # previous token
    assert js[1, 0] > 5 * js[0, 1]
    assert js[1, 3] > 5 * js[0, 1]
    assert (chosen["n"] == 3).all()
    assert (chosen["low"] <= chosen["value"] + 1e-12).all()
    assert (chosen["value"] <= chosen["high"] + 1e-12).all()
    assert "a to b" in repr(found)


def test_too_few_blocks_are_not_scored():
    one, other = (trace_of(probabilities(1, 2, 33, seed)) for seed in (0, 1))  # three blocks
    found = stability({"a": [one], "b": [other]})
    assert np.isnan(found.values["a", "b", "jaccard", "sink_excluded"]).all()
    assert np.isfinite(found.values["a", "b", "jaccard", "raw"]).all()


def test_the_figure_shows_each_pair_with_intervals():
    p = [probabilities(1, 2, 83, seed) for seed in range(4)]
    found = stability(
        {"x": [trace_of(p[0]), trace_of(p[1])], "y": [trace_of(p[2]), trace_of(p[3])]}
    )
    figure = found.plot("recall", "sink_excluded")
    assert [line.name for line in figure.data] == ["x to y", "y to x"]
    table = found.table()
    rows = table[
        (table["metric"] == "recall")
        & (table["variant"] == "sink_excluded")
        & (table["first"] == "x")
    ]
    assert list(figure.data[0].y) == pytest.approx(rows["value"].tolist())
    assert "left out" in figure.layout.title.text
    with pytest.raises(LensError, match="no 'magic' \\(raw\\) was measured; there are jaccard"):
        found.plot("magic")


def test_what_cannot_be_compared_is_refused():
    p, q = probabilities(1, 2, 33, 0), probabilities(1, 2, 35, 0)
    one = trace_of(p)
    cases = [
        (lambda: stability({"a": [one]}), "at least two conditions, got 1"),
        (
            lambda: stability({"a": [one], "b": [one]}, density=1),
            "density must lie between 0 and 1",
        ),
        (lambda: stability({"a": [one], "b": []}), "equally many traces"),
        (lambda: stability({"a": [one], "b": [trace_of(q)]}), "paired traces must have the same"),
        (
            lambda: stability({"a": [one], "b": [trace_of(p, without=("block_mass",))]}),
            "no block_mass",
        ),
    ]
    for call, message in cases:
        with pytest.raises(LensError, match=message):
            call()
    without = stability({"a": [trace_of(p, without=("lse",))], "b": [one]})
    assert isinstance(without, HeadStability)
    assert {key[2] for key in without.values} == METRICS
    with pytest.raises(LensError, match="no LSE drift from 'a' to 'b'"):
        without.reusable("a", "b")


def test_cross_attention_is_compared_on_all_blocks():
    """Five queries on seven keys: a diagonal of two sequences means nothing, and LSE go by queries."""
    model = lens.load(made("bart")).part("cross")
    one = lens.capture(model, inputs_of("bart"), block_size=2, progress=False)
    assert one.cross
    assert one.queries != one.length
    found = stability({"a": [one], "b": [one]})
    assert found.values["a", "b", "jaccard", "sink_excluded"] == pytest.approx(1)
    assert found.values["a", "b", "drift", "raw"] == pytest.approx(0)
