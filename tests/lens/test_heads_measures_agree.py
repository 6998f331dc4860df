"""Agreement of measures: tau and overlap against naive twins, the bootstrap, and refusals."""

import numpy as np
import pandas as pd
import pytest

import lens
from lens import stats
from lens.common.errors import LensError
from lens.heads import agreement, importance, join
from lens.heads.measures.scores import HeadScores, Intervention


@pytest.fixture(scope="module")
def small():
    return lens.load("induction-2l")


def scores(values, baseline="mean", **changes):
    """[layer, head, prompt] -> HeadScores."""
    values = np.asarray(values, float)
    fields = {
        "per_prompt": values,
        "clean": np.zeros(values.shape[2]),
        "method": "ablation",
        "intervention": Intervention(baseline),
        "metric": "loss",
        "sign": -1,
        "task": "made",
        "model": "toy",
    }
    return HeadScores(**fields | changes)


def test_every_pair_is_compared():
    random = np.random.default_rng(0)
    base = random.normal(size=(3, 4, 1))
    near = scores(base + 0.3 * random.normal(size=(3, 4, 19)), "zero")
    same = scores(base + 0.3 * random.normal(size=(3, 4, 19)), "mean")
    against = scores(-base + 0.3 * random.normal(size=(3, 4, 19)), "resample")
    found = agreement(near, same, against)
    assert found.k == 3
    assert found.n == (19, 19, 19)
    table = found.table()
    assert table["first"].tolist() == ["ablation (zero)"] * 2 + ["ablation (mean)"]
    assert table["second"].tolist() == ["ablation (mean)"] + ["ablation (resample)"] * 2
    assert table["tau"].tolist() == [
        stats.kendall([a.values.ravel(), b.values.ravel()])[0, 1]
        for a, b in ((near, same), (near, against), (same, against))
    ]
    assert table["tau"][0] > 0.7 > -0.7 > table["tau"][1]
    assert (table["tau_low"] < table["tau_high"]).all()
    assert (table["tau_low"] <= table["tau"]).all()
    assert (table["overlap_by_chance"] == 0.25).all()
    assert table["overlap"][0] > 0.5
    assert table["overlap"][1] == 0
    assert repr(found).startswith("Agreement(ablation (zero) and ablation (mean): tau 0.")
    assert "top 3 share" in repr(found)
    assert found.table().equals(agreement(near, same, against).table())


def test_prompts_of_one_task_are_redrawn_together():
    """Two measures that rise and fall together: their order agrees in every resample."""
    random = np.random.default_rng(0)
    noisy = random.normal(size=(2, 5, 11))
    together = agreement(scores(noisy, "zero"), scores(2 * noisy, "mean")).table().iloc[0]
    assert (together["tau_low"], together["tau_high"]) == (1, 1)
    apart = agreement(scores(noisy), scores(2 * noisy, task="other")).table().iloc[0]
    assert apart["tau"] == 1
    assert apart["tau_low"] < 0.9
    assert (apart["first"], apart["second"]) == (
        "ablation (mean) on made",
        "ablation (mean) on other",
    )


def test_one_prompt_has_no_interval_and_no_order_no_tau():
    random = np.random.default_rng(0)
    one, other = (scores(random.normal(size=(2, 5, 1)), name) for name in ("zero", "mean"))
    row = agreement(one, other).table().iloc[0]
    assert np.isfinite(row["tau"])
    assert np.isnan(
        [row[f"{name}_{end}"] for name in ("tau", "overlap") for end in ("low", "high")]
    ).all()
    flat = scores(np.zeros((2, 5, 7)), "zero")
    row = agreement(flat, scores(random.normal(size=(2, 5, 7)))).table().iloc[0]
    assert np.isnan([row["tau"], row["tau_low"], row["tau_high"]]).all()


def test_what_cannot_be_compared_is_refused():
    random = np.random.default_rng(0)
    one, other = (scores(random.normal(size=(2, 5, 3)), name) for name in ("zero", "mean"))
    with pytest.raises(LensError, match="too few measures: at least 2 must be given, got 1"):
        agreement(one)
    with pytest.raises(LensError, match=r"ablation \(zero\) is given twice"):
        agreement(one, one)
    with pytest.raises(LensError, match="measures of one model can be compared, got toy, toy two"):
        agreement(one, scores(np.zeros((2, 5, 3)), model="toy two"))
    with pytest.raises(LensError, match="too few measures: at least 1 must be given, got 0"):
        join()
    with pytest.raises(LensError, match=r"takes results with one row per head, .* got 'a table'"):
        join("a table")
    with pytest.raises(LensError, match="measures of one model"):
        join(one, scores(np.zeros((3, 5, 3)), "mean"))
    for k in (0, 11):
        with pytest.raises(LensError, match=f"k must be 1 to 10, got {k}"):
            agreement(one, other, k=k)
    with pytest.raises(LensError, match="resamples must be a positive integer, got 0"):
        agreement(one, other, resamples=0)


def test_measures_stand_side_by_side():
    random = np.random.default_rng(0)
    one, other = (scores(random.normal(size=(2, 3, 7)), name) for name in ("zero", "mean"))
    table = join(one, other)
    assert table["name"].tolist() == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    for score in (one, other):
        assert table[score.label].tolist() == score.values.ravel().tolist()
        own = score.table().set_index("name").loc[table["name"]]
        for end in ("low", "high"):
            assert table[f"{score.label}_{end}"].tolist() == own[end].tolist()
    assert join(one, scores(one.per_prompt, "zero", task="other")).columns[[3, 6]].tolist() == [
        "ablation (zero) on made",
        "ablation (zero) on other",
    ]


def test_one_measure_of_two_checkpoints_stands_side_by_side_under_names():
    random = np.random.default_rng(0)
    old, new = (scores(random.normal(size=(2, 3, 7)), model=name) for name in ("step 1", "step 2"))
    third = scores(random.normal(size=(2, 3, 7)), "mean")
    table = join(third, before=old, after=new)
    for label, score in (("before", old), ("after", new), (third.label, third)):
        assert table[label].tolist() == score.values.ravel().tolist()
        own = score.table().set_index("name").loc[table["name"], "low"]
        assert table[f"{label}_low"].tolist() == own.tolist()
    with pytest.raises(LensError, match="only models of one size can be joined head by head"):
        join(before=old, after=scores(np.zeros((3, 5, 3))))
    for twice in (
        lambda: join(third, **{third.label: old}),
        lambda: join(before=old, other=third.table().rename(columns={"value": "before"})),
    ):
        with pytest.raises(LensError, match="is a column of another result; give this one another"):
            twice()


def test_tables_of_heads_join_by_layer_and_head(small):
    """Importance, roles, sinks, streaming and retrieval: three lines, and a row of L1H3 is a row of L1H3."""
    copied = lens.tasks.copied(small, 25)
    trace = lens.capture(small, copied, progress=False)
    scores = importance(small, lens.tasks.induction(small, n=4), method="gradient", progress=False)
    roles = lens.heads.roles(small, copied, progress=False)
    rate = lens.sinks.rate(trace)
    streaming = lens.heads.streaming(small, copied, first=1, last=8, progress=False)
    table = join(scores, roles, streaming, sinks=rate)
    assert table.columns[:6].tolist() == [
        "name", "layer", "head", "gradient", "gradient_low", "gradient_high",
    ]  # fmt: skip
    assert {"n_streaming_scores", "n_sinks", "alpha", "induction_low", "kept"} <= set(table)
    assert table["name"].tolist() == [f"L{a}H{b}" for a in range(2) for b in range(4)]
    for one, column in ((roles, "induction"), (streaming, "kept"), (rate, "alpha")):
        own = one.table().sample(frac=1, random_state=0)  # the order of rows does not matter
        wanted = {(row["layer"], row["head"]): row[column] for row in own.to_dict("records")}
        assert join(scores, own)[column].tolist() == [
            wanted[pair] for pair in zip(table["layer"], table["head"], strict=True)
        ]
    assert table["gradient"].tolist() == scores.values.ravel().tolist()


def test_what_is_no_table_of_heads_is_not_joined():
    pairs = pd.DataFrame({"first": ["L0H0"], "second": ["L0H1"]})
    with pytest.raises(LensError, match="table_1 has no whole numbers in a column 'layer'"):
        join(pairs)
    twice = pd.DataFrame({"layer": [0, 0], "head": [1, 1], "value": [1.0, 2.0]})
    with pytest.raises(LensError, match="table_1 has several rows of L0H1"):
        join(twice)


def test_findings_of_an_agreement():
    """The golden sentences of three measures of four heads, and the pair that agrees least."""
    low, high = (
        np.repeat(np.array([values], float)[..., None], 5, 2)
        for values in ([1, 2, 3, 4], [4, 3, 2, 1])
    )
    flat = np.zeros((1, 4, 5))
    found = agreement(
        scores(low, "zero"),
        scores(high, "mean"),
        scores(2 * low, "resample"),
        scores(flat, "pooled_mean"),
    )
    said = found.findings()
    assert [one.kind for one in said] == [
        "opposition", "agreement", "no_order", "opposition", "no_order", "no_order",
    ]  # fmt: skip
    assert said[0] == (
        "ablation (zero) and ablation (mean) share no most important head (0% [0%, 0%], by chance 25%): L0H3 only by "
        "ablation (zero); L0H0 only by ablation (mean); over all heads their orders are opposed, "
        "tau -1.00 [-1.00, -1.00]."
    )
    assert said[1] == (
        "ablation (zero) and ablation (resample) share their most important head (100% [100%, 100%], by chance 25%); over all heads "
        "their orders agree beyond chance, tau 1.00 [1.00, 1.00]."
    )
    assert found.findings(most=2) == (said[0], said[3])
    every = agreement(scores(low, "zero"), scores(high, "mean"), k=4).findings()[0]
    assert (
        "share 4 of their 4 most important heads (100% [100%, 100%], by chance 100%); over" in every
    )
    half = agreement(scores(low, "zero"), scores(high, "mean"), k=3).findings()[0]
    assert (
        "share 2 of their 3 most important heads (67% [67%, 67%], by chance 75%): L0H3 only" in half
    )


def test_one_measure_on_a_single_prompt_has_no_interval_and_the_others_have_theirs():
    many = np.random.default_rng(0).normal(size=(1, 8, 6)) + np.arange(8)[None, :, None]
    pair = scores(many, "zero"), scores(many * 2, "mean")
    single = scores(many[..., :1], "resample")
    (alone,) = agreement(*pair).findings()
    said = agreement(*pair, single).findings()
    assert said[0] == alone
    assert [one.kind for one in said] == ["agreement", "no_order", "no_order"]
    assert "without an interval (one of them has a single prompt)" in said[1]


def test_orders_that_are_not_told_apart_from_chance():
    noise = np.random.default_rng(0).normal(size=(1, 40, 5))
    (alike,) = agreement(scores(noise, "zero"), scores(noise[:, ::-1], "mean")).findings()
    assert alike.kind == "chance"
    assert "over all heads their orders are not told apart from chance, tau " in alike
