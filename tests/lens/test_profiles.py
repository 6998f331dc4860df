"""The profile equals a naive twin on whole probability matrices, and its closed forms."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from lens import profile as shown
from lens import stats
from lens.common.errors import LensError
from lens.stats.intervals import of_share
from lens.traces.metrics import METRICS
from lens.traces.profiles import COLUMNS, pooled_table, prompt_table
from lens.traces.token_rows import is_delimiter, token_classes
from lens.traces.trace import AttentionTrace
from tests.lens.naive import rms_ratio
from tests.lens.traces import LENGTH, probabilities, token_ids, trace_of

profile = partial(shown, all=True)
MARKS = {0: ",", 3: " ?!"}  # the first key is one of them


def twin(p, ids) -> dict[str, float]:
    """Scores of one head from its causal matrix [queries, keys], by the words of `lens.traces.metrics`."""
    n = len(ids)
    rest = p[:, 1:] / np.maximum(p[:, 1:].sum(-1, keepdims=True), 1e-300)
    rest = np.concatenate([np.zeros((n, 1)), rest], axis=1)
    found = {}
    for name, q, first in (("", p, 1), ("_sink_excluded", rest, 2)):
        repeated = [i for i in range(n) if ids[i] in ids[first - 1 : i]]
        follows = [i for i in range(n) if ids[i] in ids[:i]]
        found[f"previous_token{name}"] = np.mean([q[i, i - 1] for i in range(first, n)])
        found[f"current_token{name}"] = np.mean([q[i, i] for i in range(1, n)])
        found[f"duplicate_token{name}"] = np.mean(
            [sum(q[i, j] for j in range(i) if ids[j] == ids[i]) for i in repeated]
        )
        found[f"induction{name}"] = np.mean(
            [sum(q[i, j] for j in range(1, i + 1) if ids[j - 1] == ids[i]) for i in follows]
        )
        found[f"entropy{name}"] = np.mean(
            [-sum(x * np.log(x) for x in q[i] if x > 0) for i in range(1, n)]
        )
        found[f"distance{name}"] = np.mean(
            [sum(q[i, j] * (i - j) for j in range(n)) for i in range(1, n)]
        )
    found["first_token"] = p[1:, 0].mean()
    found["prefix_mass"] = p[4:, :4].sum(-1).mean()
    found["effective_keys"] = np.mean([1 / (p[i] ** 2).sum() for i in range(1, n)])
    for name, start in (("", 0), ("_sink_excluded", 1)):
        near = [(i, j) for i in range(n) for j in range(start, n) if abs(i - j) <= 8]
        found[f"locality{name}"] = sum(p[i, j] for i, j in near) / p[:, start:].sum()
        marks = [j for j in range(start, n) if ids[j] in MARKS]
        found[f"delimiter{name}"] = p[:, marks].sum() / p[:, start:].sum()
    by_distance = [np.mean([p[i, i - d] for i in range(d, n)]) for d in range(n - 15)]
    found["positional"] = max(by_distance)
    found["positional_distance"] = int(np.argmax(by_distance))
    alpha = np.array([p[k:, k].mean() for k in range(n)])
    found["sink_mass"] = alpha[0]
    found["sink_rate"] = float(alpha[0] > 0.3)
    found["top_key"] = alpha[: n - 15].argmax()
    found["top_key_mass"] = alpha[: n - 15].max()
    return found


def test_every_score_equals_its_twin():
    p = probabilities(layers=2, heads=3, length=LENGTH, seed=5)
    p[0, 1, 1:] *= 0.2
    p[0, 1, 1:, 0] += 1 - p[0, 1, 1:].sum(-1)  # one head with a real sink
    table = profile(named(trace_of(p)))
    assert len(table) == 6
    for row in table.itertuples():
        expected = twin(p[row.layer, row.head], token_ids(LENGTH))
        found = {name: getattr(row, name) for name in expected}
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=2e-5), (
                row.layer,
                row.head,
                name,
            )
    assert set(expected) == {
        name
        for metric in METRICS.values()
        for name in (metric.name, f"{metric.name}_sink_excluded")[: 1 + metric.sink_excluded]
    }
    assert table.loc[1, "sink_rate"] == 1
    assert table.loc[1, "top_key_token"] == ","


def named(trace: AttentionTrace) -> AttentionTrace:
    """The trace with punctuation for the ids of `MARKS`."""
    ids = trace.dataset["token_id"].values
    tokens = np.array([MARKS.get(i, f"t{i}") for i in ids], dtype=object)
    return AttentionTrace(trace.dataset.assign_coords(key_token=("key", tokens)))


def test_a_planted_distance_is_found_and_a_long_one_is_not_believed():
    """Mean over few rows is large by chance: a distance counts when 16 queries have it."""
    p = np.zeros((1, 2, 61, 61))
    for i in range(61):
        p[0, 0, i, max(i - 7, 0)] = 1
        p[0, 1, i, 0 if i > 50 else i] = 1  # distances 51 to 60 have full mass, in few rows
    table = profile(trace_of(p))
    assert table["positional_distance"].tolist() == [7, 0]
    assert table["positional"].tolist() == [1.0, pytest.approx(51 / 61)]


def test_the_distance_of_several_prompts_is_the_most_frequent_one():
    def one(distance):
        p = np.zeros((1, 1, 40, 40))
        for i in range(40):
            p[0, 0, i, max(i - distance, 0)] = 1
        return trace_of(p)

    assert profile([one(2), one(9), one(9)])["positional_distance"].tolist() == [9]
    assert profile(one(2), seed=1)["positional"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (",", True),
        (" ?!", True),
        ("\n", True),
        (" ", False),
        ("a.", False),
        ("$", False),
        ("—", True),
    ],
)
def test_delimiters_are_punctuation_and_line_breaks(token, expected):
    assert is_delimiter(token) is expected


def test_a_prompt_without_delimiters_has_no_score_of_them():
    p = probabilities(layers=1, heads=2, length=LENGTH, seed=5)
    table = profile(trace_of(p))
    assert table[["delimiter", "delimiter_sink_excluded"]].isna().all().all()
    assert "no punctuation" in table.attrs["reasons"]["delimiter"]


def test_a_head_that_looks_at_the_first_key_alone_has_no_locality_without_it():
    p = np.zeros((1, 1, 31, 31))
    p[..., 0] = 1
    table = profile(trace_of(p))
    assert table["locality"].tolist() == [pytest.approx(9 / 31)]
    assert table["locality_sink_excluded"].isna().all()
    assert table.attrs["reasons"]["locality_sink_excluded"] == "no attention to keys from 1 on"


@pytest.mark.parametrize(("length", "alpha"), [(16, 0.211296), (64, 0.0741233), (256, 0.023923)])
def test_uniform_attention_has_the_published_alpha(length, alpha):
    """alpha_1 = H_T / T under uniform causal attention (Gu et al., arXiv 2410.10781)."""
    rows = np.tri(length)
    p = (rows / rows.sum(-1, keepdims=True))[None, None]
    row = profile(trace_of(p)).iloc[0]
    assert row["sink_mass"] == pytest.approx(alpha, rel=1e-5)
    assert row["sink_rate"] == 0


@pytest.mark.parametrize(("mass", "rate"), [(0.288, 0.0), (0.29, 1.0)])
def test_a_constant_sink_crosses_the_threshold_where_it_should(mass, rate):
    """alpha_1 = (1 + (T - 1) m) / T crosses 0.3 at m = 0.288889 for T = 64."""
    p = np.zeros((1, 1, 64, 64))
    p[0, 0, np.arange(64), np.arange(64)] = 1 - mass
    p[0, 0, :, 0] += mass
    row = profile(trace_of(p)).iloc[0]
    assert row["sink_mass"] == pytest.approx((1 + 63 * mass) / 64, rel=1e-6)
    assert row["sink_rate"] == rate


def test_the_share_of_prompts_with_a_sink_has_the_interval_of_a_share():
    """Four of four prompts drawn again are always four of four; that says nothing of the fifth."""
    p = np.zeros((1, 1, 16, 16))
    p[0, 0, :, 0] = 1
    with_sink, without = (
        prompt_table(trace_of(one), "p", seed=None) for one in (p, np.eye(16)[None, None])
    )
    for tables, share in (([with_sink] * 4, 1.0), ([with_sink, without, without], 1 / 3)):
        rows = pooled_table(tables, "all").set_index("metric")
        row = rows[rows["variant"] == "raw"].loc["sink_rate"]
        assert (row["low"], row["high"]) == of_share(share, len(tables))
    assert np.isnan(pooled_table([with_sink], "all").set_index("metric").loc["sink_rate", "low"])
    assert np.isnan(
        pooled_table([with_sink] * 4, "all", seed=None).set_index("metric").loc["sink_rate", "low"]
    )


def test_the_last_keys_cannot_be_the_strongest():
    p = np.eye(40)[None, None]
    row = profile(trace_of(p)).iloc[0]
    assert row["top_key"] <= 40 - 16


def test_what_cannot_be_scored_is_nan_with_its_reason():
    p = probabilities(layers=1, heads=2, length=7, seed=0)
    table = profile(trace_of(p, ids=[*range(7)]))
    assert table[["induction", "duplicate_token", "top_key"]].isna().all().all()
    reasons = table.attrs["reasons"]
    assert reasons["induction"] == "no row sees a key that followed a copy of its token"
    assert reasons["top_key"] == "no key is seen by 16 queries"


def test_induction_is_refused_where_the_model_looks_ahead():
    p = probabilities(layers=1, heads=2, length=23, seed=0, causal=False)
    table = profile(trace_of(p, causal=False))
    assert table["induction"].isna().all()
    assert "looks back only" in table.attrs["reasons"]["induction"]
    expected = np.mean([p[0, 0, i, i - 1] for i in range(1, 23)])
    assert table.loc[0, "previous_token"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_the_mean_of_its_prompts_with_an_interval():
    traces = [
        trace_of(probabilities(layers=2, heads=2, length=31 + 2 * s, seed=s)) for s in range(5)
    ]
    batch, single = profile(traces), [profile(trace) for trace in traces]
    for name in ("induction", "entropy_sink_excluded", "sink_mass", "locality"):
        stack = np.stack([table[name] for table in single])
        assert rms_ratio(batch[name], stack.mean(0)) < 1e-12
        low, high = stats.over_units(stack, np.ones_like(stack), 0)
        assert rms_ratio(batch[f"{name}_low"], low) < 1e-9
        assert rms_ratio(batch[f"{name}_high"], high) < 1e-9
        assert (batch[f"{name}_low"] < batch[f"{name}_high"]).all()
    assert (batch["prompts"] == 5).all()
    pd.testing.assert_frame_equal(batch, profile(traces))


def test_intervals_cover_what_they_should():
    """95 % bootstrap over 12 prompts covers the true mean of a normal about 9 times in 10."""
    rng = np.random.default_rng(3)
    table = prompt_table(trace_of(probabilities(layers=1, heads=100, length=19, seed=1)), "p000")
    table = table[table["metric"] == "entropy"].copy()
    tables = [table.assign(value=rng.normal(1.0, 0.3, len(table))) for _ in range(12)]
    pooled = pooled_table(tables, "text")
    covered = ((pooled["low"] <= 1.0) & (pooled["high"] >= 1.0)).mean()
    assert 0.83 < covered < 0.99


def test_long_table_has_the_columns_of_the_schema():
    table = prompt_table(trace_of(probabilities(layers=1, heads=2, length=23, seed=0)), "p007")
    assert tuple(table.columns) == COLUMNS
    assert set(table["prompt_id"]) == {"p007"}
    assert set(table["metric"]) == set(METRICS)
    assert not table.duplicated(["layer", "head", "metric", "variant"]).any()


def test_models_of_different_sizes_are_not_mixed():
    a = trace_of(probabilities(layers=1, heads=2, length=19, seed=0))
    b = trace_of(probabilities(layers=1, heads=3, length=19, seed=0))
    with pytest.raises(LensError, match="must come from one model"):
        profile([a, b])
    other = trace_of(probabilities(layers=1, heads=2, length=19, seed=0))
    other.dataset.attrs["model"] = "another"
    with pytest.raises(
        LensError, match=r"come from one model, got \['an.*', 'an.*'\]: profile them"
    ):
        profile([a, other])
    with pytest.raises(LensError, match="at least one trace"):
        profile([])


def test_twelve_columns_are_shown_unless_all_are_asked_for(monkeypatch):
    traces = [trace_of(probabilities(2, 3, LENGTH, seed)) for seed in (1, 2)]
    short, whole = shown(traces), profile(traces)
    assert " ".join(short) == (
        "name layer head previous_token duplicate_token induction first_token sink_mass entropy "
        "effective_keys distance top_key_token"
    )
    pd.testing.assert_frame_equal(short, whole[list(short)])
    assert short.attrs == whole.attrs
    beside = shown(traces, random_weights=traces)
    assert set(beside) - set(short) == {
        f"{name}_random_weights"
        for name in ("induction", "sink_mass", "previous_token", "duplicate_token")
    }
    alone = profile(traces[0])
    for drawing in ("scores.over_rows", "profiles.over_units"):
        monkeypatch.setattr(f"lens.traces.{drawing}", lambda *_: pytest.fail("nobody sees it"))
    pd.testing.assert_frame_equal(shown(traces[0]), alone[list(short)])
    pd.testing.assert_frame_equal(shown(traces, random_weights=traces), beside)


def test_a_trace_without_what_it_takes_says_so():
    p = probabilities(layers=1, heads=2, length=19, seed=0)
    with pytest.raises(LensError, match="needs match_mass, which this trace lacks"):
        profile(trace_of(p, without=("match_mass",)))


@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 11), (False, None), (False, 11)]
)
def test_uniform_attention_is_scored_exactly(causal, window):
    """Counts over mask and labels give what the very definitions give on the whole matrix."""
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    reach = LENGTH if window is None else window
    seen = (np.abs(distance) < reach) & ((distance >= 0) | (not causal))
    even = seen / seen.sum(-1, keepdims=True)
    p = probabilities(layers=2, heads=3, length=LENGTH, seed=5, causal=causal)
    table = prompt_table(trace_of(p, causal=causal, windows=[window] * 2), "p", seed=None)
    known = prompt_table(
        trace_of(even[None, None], causal=causal, windows=[window]), "p", seed=None
    )
    expected = known[~known["metric"].isin(["top_key", "positional_distance"])]
    assert len(expected) == 23
    for row in expected.to_dict("records"):
        same = (table["metric"] == row["metric"]) & (table["variant"] == row["variant"])
        found = table.loc[same, "uniform"]
        np.testing.assert_allclose(found, row["value"], atol=2e-6, err_msg=row["metric"])
    assert (
        table.loc[table["metric"].isin(["top_key", "positional_distance"]), "uniform"].isna().all()
    )


def test_no_uniform_score_is_invented_for_a_mask_of_another_form():
    p = probabilities(layers=1, heads=2, length=LENGTH, seed=5)
    holed = np.arange(LENGTH, 0, -1)
    holed[3] = 0  # a key that nobody sees
    assert prompt_table(trace_of(p, visible=holed), "p", seed=None)["uniform"].isna().all()


def test_the_highest_head_with_random_weights_stands_beside_every_head():
    first, second, third, fourth = (
        trace_of(probabilities(layers=2, heads=3, length=LENGTH, seed=seed)) for seed in range(4)
    )
    table = profile([first, second], random_weights=[third, fourth])
    random = profile([third, fourth])
    for metric in ("induction", "sink_mass", "previous_token", "duplicate_token"):
        assert table[f"{metric}_random_weights"].tolist() == [random[metric].max()] * 6
        even = [profile(trace)[f"{metric}_uniform"].iloc[0] for trace in (first, second)]
        np.testing.assert_allclose(table[f"{metric}_uniform"], np.mean(even))
    assert "entropy_random_weights" not in table
    assert not any(name.endswith("_random_weights") for name in random)
    other = trace_of(probabilities(layers=2, heads=3, length=LENGTH, seed=0), ids=[0] * LENGTH)
    with pytest.raises(LensError, match="traces of the same prompts"):
        profile([first], random_weights=[other])
    third.dataset.attrs["picture"] = {"png": "b3RoZXI="}  # whose patches have no token ids
    with pytest.raises(LensError, match="traces of the same prompts"):
        profile([first], random_weights=[third])


def test_words_and_their_pieces_are_told_apart_in_both_ways_of_writing_them():
    assert token_classes(["<s>", "Att", "ention", " is", ","]) == [
        *("first", "word", "piece", "word", "delimiter"),
    ]
    assert token_classes(["Att", "ention", " is"]) == ["first", "piece", "word"]
    assert token_classes(["[CLS]", "to", "##ken", "##ization", "."]) == [
        *("first", "word", "piece", "piece", "delimiter"),
    ]
    assert token_classes(["a", "b"]) == ["first", "word"]  # symbols
