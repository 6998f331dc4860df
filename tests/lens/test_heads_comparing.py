"""Agreement of measures: tau and overlap against naive twins, the bootstrap, and refusals."""

import numpy as np
import pytest

from lens import stats
from lens.common.errors import LensError
from lens.heads import HeadScores, Intervention, agreement, join


def scores(values, baseline="mean", **changes):
    """[layer, head, prompt] -> HeadScores."""
    values = np.asarray(values, float)
    fields = {
        "per_prompt": values,
        "clean": np.zeros(values.shape[2]),
        "by": "ablation",
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
    table = found.table
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
    assert found.table.equals(agreement(near, same, against).table)


def test_prompts_of_one_task_are_redrawn_together():
    """Two measures that rise and fall together: their order agrees in every resample."""
    random = np.random.default_rng(0)
    noisy = random.normal(size=(2, 5, 11))
    together = agreement(scores(noisy, "zero"), scores(2 * noisy, "mean")).table.iloc[0]
    assert (together["tau_low"], together["tau_high"]) == (1, 1)
    apart = agreement(scores(noisy), scores(2 * noisy, task="other")).table.iloc[0]
    assert apart["tau"] == 1
    assert apart["tau_low"] < 0.9
    assert (apart["first"], apart["second"]) == (
        "ablation (mean) on made",
        "ablation (mean) on other",
    )


def test_one_prompt_has_no_interval_and_no_order_no_tau():
    random = np.random.default_rng(0)
    one, other = (scores(random.normal(size=(2, 5, 1)), name) for name in ("zero", "mean"))
    row = agreement(one, other).table.iloc[0]
    assert np.isfinite(row["tau"])
    assert np.isnan(
        [row[f"{name}_{end}"] for name in ("tau", "overlap") for end in ("low", "high")]
    ).all()
    flat = scores(np.zeros((2, 5, 7)), "zero")
    row = agreement(flat, scores(random.normal(size=(2, 5, 7)))).table.iloc[0]
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
    with pytest.raises(LensError, match="measures of one model"):
        join(one, scores(np.zeros((3, 5, 3)), "mean"))
    for k in (0, 11):
        with pytest.raises(LensError, match=f"k must be 1 to 10, got {k}"):
            agreement(one, other, k=k)
    with pytest.raises(LensError, match="resamples must be at least 1, got 0"):
        agreement(one, other, resamples=0)


def test_measures_stand_side_by_side():
    random = np.random.default_rng(0)
    one, other = (scores(random.normal(size=(2, 3, 7)), name) for name in ("zero", "mean"))
    table = join(one, other)
    assert table["head"].tolist() == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    for score in (one, other):
        assert table[score.label].tolist() == score.values.ravel().tolist()
        own = score.table().set_index("head").loc[table["head"]]
        for end in ("low", "high"):
            assert table[f"{score.label} {end}"].tolist() == own[end].tolist()
    assert join(one, scores(one.per_prompt, "zero", task="other")).columns[[3, 6]].tolist() == [
        "ablation (zero) on made",
        "ablation (zero) on other",
    ]
