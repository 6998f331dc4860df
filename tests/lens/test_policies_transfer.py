"""Whether a pattern serves another trace: identity, chance, and the numbers of the models' own attention."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import xarray as xr

import lens
from lens.policies import transfer
from lens.policies.transferring import MEASURES, paired_units, transfer_measures
from lens.stats.intervals import known_mean
from lens.traces.trace import AttentionTrace


def trace(masses, lse=None, tokens=8):
    """A trace as far as it is asked: [layers, heads, query_blocks, key_blocks]."""
    masses = np.asarray(masses, float)
    lse = np.zeros((*masses.shape[:2], tokens)) if lse is None else lse
    dataset = xr.Dataset(
        {
            "block_mass": (("layer", "head", "query_block", "key_block"), masses),
            "lse": (("layer", "head", "query"), lse),
        },
        coords={"layer": np.arange(len(masses)), "key": np.arange(tokens)},
        attrs={"model": "m"},
    )
    return AttentionTrace(dataset)


def causal(generator, blocks=24, shape=(2, 3)):
    weight = generator.random((*shape, blocks, blocks)) * np.tri(blocks)
    return weight / weight.sum(-1, keepdims=True)


def run(*traces: Any, **options: Any):
    return transfer(list(traces), **options)


def test_a_trace_serves_itself():
    one = trace(causal(np.random.default_rng(0)))
    row = run(one, one).table()
    assert np.allclose(row["overlap"], 1)
    assert np.allclose(row["efficiency"], 1)
    assert np.allclose(row["lse_error"], 0)
    said = {sentence.kind: sentence for sentence in run(one, one).findings()}
    assert set(said) == {"transfer", "lse"}
    assert "Overlap above chance 1.00" in said["transfer"]
    assert "in 6 of 6 heads" in said["lse"]


def test_independent_patterns_overlap_by_chance_and_serve_like_random_blocks():
    generator = np.random.default_rng(1)
    found = run(*(trace(causal(generator)) for _ in range(6)), share=0.25).table()
    assert abs(found["overlap"].mean()) < 0.05
    early = run(*(trace(causal(generator, blocks=8)) for _ in range(40)), share=0.2).table()
    assert abs(early["overlap"].mean()) < 0.02  # the first rows have no choice: that is chance, too
    assert found["recall"].mean() == pytest.approx(found["random_recall"].mean(), abs=0.02)
    assert (found["own_recall"] > found["recall"] + 0.1).all()


def test_two_traces_are_one_unit_as_two_prompts_are():
    generator = np.random.default_rng(4)
    masses = [causal(generator, blocks=8) for _ in range(3)]
    two, three = (run(*map(trace, masses[:n])) for n in (2, 3))
    assert set(two.table()["n"]) == {1}
    assert two.table()["efficiency_low"].isna().all()
    assert "[" not in two.findings()[0]
    assert "nan" not in " ".join(two.findings())
    table = three.table()
    assert set(table["n"]) == {3}
    pairs = three.values[3][~np.eye(3, dtype=bool)]
    assert np.allclose(table["efficiency"], pairs.mean(0).ravel())
    assert (table["efficiency_low"] < table["efficiency_high"]).all()


def test_intervals_of_pairs_end_where_the_measure_does():
    """Pseudo-values of three traces, of which one is unlike the others, lie beyond 0 and 1."""
    generator = np.random.default_rng(2)
    one, other = causal(generator, 16), causal(generator, 16)
    drift = 3 * generator.random((2, 3, 8))
    found = run(trace(one), trace(one), trace(other, drift))
    table = found.table()
    units = paired_units(np.moveaxis(found._pairs, 1, -1))
    assert (units[MEASURES.index("efficiency")].max(-1) > 1).any()
    assert (units[MEASURES.index("lse_error")].min(-1) < 0).any()
    for name in ("recall", "own_recall", "efficiency", "random_recall"):
        assert table[[f"{name}_low", f"{name}_high"]].stack().between(0, 1).all()
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    assert (table["lse_error_low"] >= 0).all()
    assert (table["lse_error_high"] > 1).any()
    assert (table["overlap_high"] <= 1).all()


def test_units_have_the_mean_of_the_pairs_that_are_known():
    whole = np.array([0.9, 0.9, 0.8, 0.8, 0.9, 0.7])
    pseudo = [3 * whole.mean() - 2 * whole[[a, b]].mean() for a, b in ((3, 5), (1, 4), (0, 2))]
    assert np.allclose(paired_units(whole), pseudo)
    some = np.where(np.arange(6) == 0, np.nan, whole)
    assert paired_units(some).mean() == pytest.approx(known_mean(some))
    assert np.isnan(paired_units(np.full(6, np.nan))).all()


def test_every_block_is_no_choice():
    one = trace(np.ones((1, 2, 1, 1)))
    found = run(one, one)
    assert found.table()["overlap"].isna().all()
    said = {sentence.kind: sentence for sentence in found.findings()}
    assert set(said) == {"transfer", "lse"}
    assert said["transfer"].startswith("Every block is chosen")
    with pytest.raises(lens.LensError, match="share must be between 0 and 1"):
        run(one, one, share=1.0)
    row = np.ones((1, 1, 1, 4))
    every = np.ones((1, 1, 1, 4), bool)
    lse = np.zeros((1, 1, 4))
    overlap = transfer_measures(every, every, row, every, lse, lse)[0]
    assert np.isnan(overlap).all()  # 0 would be as by chance, 1 a choice that agrees


def test_the_lse_of_another_run_is_off_by_its_exponential():
    masses = causal(np.random.default_rng(2))
    drift = np.full((2, 3, 8), 0.02)
    drift[1, 2] = 0.3
    found = run(trace(masses), trace(masses, drift))
    off = (np.expm1(drift[..., 0]) + np.abs(np.expm1(-drift[..., 0]))) / 2
    assert np.allclose(found.table()["lse_error"], off.ravel())
    said = {sentence.kind: sentence for sentence in found.findings()}
    assert "usable (99 % of rows within 5%) in 5 of 6 heads" in said["lse"]


def test_patterns_of_a_model_are_compared_by_its_own_attention():
    model = lens.load("text-lm-3l")
    ids = model.encode(lens.tasks.text("moby-dick"))
    traces = [
        lens.capture(model, ids[at : at + 64], block_size=8, progress=False) for at in (0, 64, 128)
    ]
    found = transfer(traces, share=0.3)
    a, b = (np.asarray(one.block_mass, float)[1, 3] for one in traces[:2])
    kept = np.zeros((8, 8), bool)
    for row in range(8):
        count = max(1, int(0.3 * (row + 1) + 1e-9))
        kept[row, np.argsort(-a[row, : row + 1], kind="stable")[:count]] = True
    assert found.values[1, 0, 1, 1, 3] == pytest.approx((b * kept).sum() / b.sum())
    table = found.table()
    assert (table["efficiency"] <= 1 + 1e-9).all()
    assert table["name"][9] == "L1H3"
    poor = dataclasses.replace(found, values=found.values * 0.5)
    assert {sentence.kind for sentence in poor.findings()} == {"transfer", "heads", "lse"}


def test_blocks_are_searched_with_the_lse_of_another_trace():
    model = lens.load("text-lm-3l")
    ids = model.encode(lens.tasks.text("moby-dick"))
    a, b = (
        lens.capture(model, ids[at : at + 60], block_size=8, keep_qk=True, progress=False)
        for at in (0, 64)
    )
    found = transfer([a, b], share=0.3, cached_lse=True)
    matrix = b.tile(1, 3, (0, 60), (0, 60))
    drift = np.exp(np.asarray(b.lse)[1, 3] - np.asarray(a.lse)[1, 3])
    exact, searched = np.zeros((8, 8)), np.zeros((8, 8))
    for row, key in np.ndindex(60, 60):
        exact[row // 8, key // 8] += matrix[row, key]
        searched[row // 8, key // 8] += matrix[row, key] * drift[row]
    kept = own = 0.0
    for row in range(8):
        count = max(1, int(0.3 * (row + 1) + 1e-9))
        kept += exact[row, np.argsort(-searched[row], kind="stable")[:count]].sum()
        own += np.sort(exact[row])[-count:].sum()
    assert found.values[-1, 0, 1, 1, 3] == pytest.approx(kept / own, abs=1e-6)
    said = {one.kind: one for one in found.findings()}
    assert f"keep {found.table()['cached_efficiency'].mean():.1%}" in said["cached"]
    without = transfer([a, b], share=0.3)
    assert without.table()["cached_efficiency"].isna().all()
    bare = lens.capture(model, ids[:60], block_size=8, progress=False)
    with pytest.raises(lens.LensError, match="keep_qk"):
        transfer([a, bare], cached_lse=True)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda one, _: [one], "at least two traces"),
        (lambda one, other: [one, other], "of one length"),
    ],
)
def test_traces_that_do_not_fit_are_refused(make, said):
    generator = np.random.default_rng(3)
    with pytest.raises(lens.LensError, match=said):
        transfer(make(trace(causal(generator)), trace(causal(generator, blocks=8))))
    with pytest.raises(lens.LensError, match=r"traces must be an AttentionTrace .*got 'a'"):
        run("a", "b")
    with pytest.raises(lens.LensError, match="share must be"):
        run(trace(causal(generator)), trace(causal(generator)), share=0)
