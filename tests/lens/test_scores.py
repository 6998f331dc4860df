"""Which rows count in a score: windows, models that look ahead, learned sinks, patches, odd masks."""

from functools import partial

import numpy as np
import pytest

from lens import profile as shown
from lens.common.errors import LensError
from lens.traces.token_rows import nearest_copy
from tests.lens.naive import rms_ratio
from tests.lens.traces import probabilities, trace_of

profile = partial(shown, all=True)

LENGTH = 41
WINDOW = 7


def masked(causal: bool, window: int | None, seed: int = 3):
    """[1, 3, length, length] random attention under the mask, and the mask."""
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    seen = np.ones((LENGTH, LENGTH), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= np.abs(i - j) < window
    logits = np.random.default_rng(seed).normal(0, 2, (1, 3, LENGTH, LENGTH))
    p = np.where(seen, np.exp(logits), 0)
    return p / p.sum(-1, keepdims=True), seen


def mean_mass(p, seen, pattern, first: int, first_row: int) -> np.ndarray:
    """[heads]: mean mass on `pattern` over the rows that can see it, keys from `first` on."""
    can = seen & pattern
    can[:, :first] = False
    rows = can.any(-1) & (np.arange(LENGTH) >= first_row)
    rest = p[:, :, first:].sum(-1)
    return np.stack([(h * can).sum(-1)[rows] / r[rows] for h, r in zip(p, rest, strict=True)]).mean(
        1
    )


@pytest.mark.parametrize("ids", [[i % period for i in range(LENGTH)] for period in (5, WINDOW, 11)])
@pytest.mark.parametrize(("causal", "window"), [(True, WINDOW), (True, None), (False, WINDOW)])
def test_only_rows_that_see_the_pattern_count(causal, window, ids):
    p, seen = masked(causal, window)
    table = profile(trace_of(p, ids=ids, causal=causal, windows=[window]))
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    ids = np.array(ids)
    same = (ids[i] == ids[j]) & (i != j)
    follows = (j >= 1) & (ids[np.maximum(j - 1, 0)] == ids[i])
    for suffix, first in (("", 0), ("_sink_excluded", 1)):
        expected = {
            "duplicate_token": (same, 0),
            "previous_token": (j == i - 1, 0),
            "current_token": (j == i, 1),
        }
        if causal:
            expected["induction"] = (follows, 0)
        for metric, (pattern, first_row) in expected.items():
            name = f"{metric}{suffix}"
            if not (seen & pattern)[:, first:].any():
                assert table[name].isna().all()
                assert "no row sees" in table.attrs["reasons"][name]
                continue
            assert rms_ratio(table[name], mean_mass(p[0], seen, pattern, first, first_row)) < 1e-5
    alpha = p[0].sum(1) / seen.sum(0)
    assert rms_ratio(table["sink_mass"], alpha[:, 0]) < 1e-5
    strongest = np.where(seen.sum(0) >= 16, alpha, -1)
    if (strongest < 0).all():
        assert table["top_key"].isna().all()
        assert (table["top_key_token"] == "").all()
    else:
        assert table["top_key"].tolist() == strongest.argmax(-1).tolist()
        assert rms_ratio(table["top_key_mass"], strongest.max(-1)) < 1e-5


def test_distance_is_signed_where_a_model_looks_ahead():
    p, _ = masked(False, None)
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    table = profile(trace_of(p, causal=False, windows=[None]))
    expected = (p[0] * (i - j)).sum(-1)[:, 1:].mean(-1)
    assert expected.min() < 0 or expected.max() < LENGTH / 4, "the case must tell signed from not"
    assert rms_ratio(table["distance"], expected) < 1e-5


def test_a_learned_sink_takes_its_share_of_raw_scores_only():
    """Rows that sum to 0.6: the sink-excluded scores are those of the same rows without it."""
    p = probabilities(layers=1, heads=2, length=LENGTH, seed=1)
    plain, drained = profile(trace_of(p)), profile(trace_of(0.6 * p, learned_sinks=True))
    for metric in ("previous_token", "induction", "duplicate_token"):
        assert rms_ratio(drained[metric], 0.6 * plain[metric]) < 1e-5
        name = f"{metric}_sink_excluded"
        assert rms_ratio(drained[name], plain[name]) < 1e-5


def test_rows_whose_rest_is_lost_in_rounding_do_not_count():
    """Where key 0 holds the row's token and nearly all mass, the difference of float32 masses is noise."""
    ids = [0 if i % 2 == 0 else 7 for i in range(LENGTH)]
    p, seen = masked(True, None)
    even = np.arange(2, LENGTH, 2)
    p[:, :, even] *= 2e-5
    p[:, :, even, 0] += 1 - p[:, :, even].sum(-1)
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    same = (i % 2 == 1) & (j % 2 == 1) & (i != j)
    found = profile(trace_of(p, ids=ids))["duplicate_token_sink_excluded"]
    assert rms_ratio(found, mean_mass(p[0], seen, same, 1, 0)) < 1e-5


def test_a_sink_lies_strictly_above_the_threshold(monkeypatch):
    monkeypatch.setattr("lens.traces.scores.SINK_EPSILON", 0.25)
    diagonal = np.eye(4)[None, None]  # alpha_0 = 1 / 4
    assert profile(trace_of(diagonal))["sink_rate"].tolist() == [0.0]
    monkeypatch.setattr("lens.traces.scores.SINK_EPSILON", 0.2499)
    assert profile(trace_of(diagonal))["sink_rate"].tolist() == [1.0]


def test_positions_without_token_ids_have_no_token_scores():
    p = probabilities(layers=1, heads=2, length=LENGTH, seed=1, causal=False)
    table = profile(trace_of(p, ids=[-1] * LENGTH, causal=False))
    assert table["duplicate_token"].isna().all()
    assert table.attrs["reasons"]["duplicate_token"] == "the prompt has no token ids"
    assert table["previous_token"].notna().all()


def test_the_sink_is_found_under_a_mask_without_compact_form():
    """Chunks of 10: only the first 10 queries see key 0, which no window says."""
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    seen = (j <= i) & (i // 10 == j // 10)
    p = np.where(seen, np.exp(np.random.default_rng(0).normal(0, 2, (3, LENGTH, LENGTH))), 0)
    p /= p.sum(-1, keepdims=True)
    trace = trace_of(p[None], visible=seen.sum(0).astype(np.int32))
    assert not trace.has_plain_mask(0)
    table = profile(trace)
    assert rms_ratio(table["sink_mass"], p[:, :10, 0].mean(-1)) < 1e-5
    assert (table["sink_rate"] == (p[:, :10, 0].mean(-1) > 0.3)).all()


@pytest.mark.parametrize("name", ["received", "diagonal", "rest_mass", "first_mass", "entropy"])
def test_a_missing_statistic_is_asked_for(name):
    p = probabilities(layers=1, heads=2, length=19, seed=0)
    with pytest.raises(
        LensError, match=rf"needs {name}, which this trace lacks; .*statistics='all'"
    ):
        profile(trace_of(p, without=(name,)))


def test_nearest_copy_equals_its_twin():
    ids = np.random.default_rng(0).integers(0, 13, 53)
    for skip_first in (False, True):
        for both_ways in (False, True):
            expected = [
                min(
                    (
                        abs(i - j)
                        for j in range(int(skip_first), 53 if both_ways else i)
                        if j != i and ids[j] == ids[i]
                    ),
                    default=np.inf,
                )
                for i in range(53)
            ]
            found = nearest_copy(ids, skip_first=skip_first, both_ways=both_ways)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_hidden_tokens_and_rows_that_do_not_see_a_pattern_do_not_count(causal):
    """Tokens 20 to 29 are hidden from all; their own rows look at the others, as those of padding do."""
    _, seen = masked(causal, None)
    hidden = (np.arange(LENGTH) >= 20) & (np.arange(LENGTH) < 30)
    seen &= ~hidden
    p = np.where(seen, np.exp(np.random.default_rng(1).normal(0, 2, (3, LENGTH, LENGTH))), 0)
    p /= p.sum(-1, keepdims=True)
    ids = np.array([i % 5 for i in range(LENGTH)])
    trace = trace_of(p[None], ids, causal, visible=seen.sum(0).astype(np.int32), windows=[None])
    table = profile(trace)
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    patterns = {"previous_token": j == i - 1, "duplicate_token": (ids[i] == ids[j]) & (i != j)}
    if causal:
        patterns["induction"] = (j >= 1) & (ids[np.maximum(j - 1, 0)] == ids[i])
    for metric, pattern in patterns.items():
        can = seen & pattern & ~hidden[:, None]
        rows = can.any(-1)
        assert rms_ratio(table[metric], (p * can).sum(-1)[:, rows].mean(-1)) < 1e-5, metric
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    assert rms_ratio(table["entropy"], entropy[:, ~hidden & (i[:, 0] > 0)].mean(-1)) < 1e-5
    assert "previous_token_uniform" not in table  # its closed form has other keys
    assert table["positional"].isna().all()
    assert "not known how many queries" in table.attrs["reasons"]["positional"]


def test_every_query_of_a_model_that_looks_ahead_sees_more_than_the_prefix():
    p = probabilities(1, 3, LENGTH, 0, causal=False)
    table = profile(trace_of(p, causal=False, windows=[None]))
    assert rms_ratio(table["prefix_mass"], p[0, :, :, :4].sum(-1).mean(-1)) < 1e-5
    assert table["prefix_mass_uniform"][0] == pytest.approx(4 / LENGTH)
