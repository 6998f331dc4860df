"""Sink detection: closed forms, naive twins, known models, refusals."""

from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from tests.lens.architectures import build
from tests.lens.traces import probabilities, trace_of

ALPHA_OF_FIRST = {16: 0.211296, 64: 0.074123, 256: 0.023923, 1024: 0.007333}


def uniform(length: int) -> np.ndarray:
    p = np.tri(length)
    return (p / p.sum(-1, keepdims=True))[None, None]


def parked(length: int, mass: float, key: int = 0) -> np.ndarray:
    """Rows after `key` put `mass` on it and the rest on themselves; the others look at themselves."""
    p = np.eye(length)
    p[key + 1 :] *= 1 - mass
    p[key + 1 :, key] += mass
    return p[None, None]


def windowed(length: int, window: int) -> np.ndarray:
    """Each row looks alike at the last `window` keys up to itself."""
    p = np.tril(np.ones((length, length))) - np.tril(np.ones((length, length)), -window)
    return (p / p.sum(-1, keepdims=True))[None, None]


def test_a_window_parts_the_rate_of_gu_et_al_from_that_over_visible_queries():
    """21 of 32 heads over the queries that see the key, 5 over all: 16 have a window of 8 keys.

    There even uniform attention gives the first key (1 + 1/2 + ... + 1/8) / 8 = 0.34.
    """
    near, far, park = windowed(67, 8)[0, 0], uniform(67)[0, 0], parked(67, 0.9)[0, 0]
    full = [[park] * 3 + [far] * 5, [park] * 2 + [far] * 6]
    p = np.array([[near] * 8, full[0], [near] * 8, full[1]])
    trace = trace_of(p, windows=[8, None, 8, None])
    seen, every = lens.sinks.rate(trace), lens.sinks.rate(trace, normalise="all")
    assert (seen.value, every.value) == (21 / 32, 5 / 32)
    assert (seen.uniform, every.uniform) == (0.5, 0)
    assert seen.alpha[0, 0] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8)
    assert every.alpha[0, 0] == pytest.approx(sum(1 / n for n in range(1, 9)) / 67)
    assert seen.findings()[0] == (
        "The first token is a sink in 65.6% of heads (with uniform attention 50.0%; α above 0.3, mean over "
        "the queries that see it; T = 67, BOS absent, n = 1)."
    )
    assert every.findings()[0] == (
        "The first token is a sink in 15.6% of heads (with uniform attention 0.0%; α above 0.3, mean over all "
        "queries from it on; T = 67, BOS absent, n = 1)."
    )
    assert np.isnan(lens.sinks.find(trace).profile.rate[1])  # a window of 8 shows it to 8 queries
    assert lens.sinks.find(trace, normalise="all").profile.rate[1] == 0
    assert set(every.table()["normalise"]) == {"all"}
    with pytest.raises(LensError, match=r"key 20 is seen by 8 queries .* a window of 8 .*'all'"):
        lens.sinks.rate(trace, key=20)
    assert lens.sinks.rate(trace, key=20, normalise="all").value == 0


def test_learned_sinks_take_of_the_first_query_too():
    """Nothing is its first key's by definition there: 0.05 is no less of a threshold than 0.5."""
    trace = trace_of(windowed(67, 8) / 20, windows=[8])
    trace.dataset.attrs["learned_sinks"] = True
    found = lens.sinks.rate(trace, epsilon=0.01)
    assert found.alpha[0, 0] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8 / 20)
    assert found.value == 1
    assert found.curve((0.01, 0.1)).values.tolist() == [1, 0]
    with pytest.raises(LensError, match="epsilons must be a list, got 3"):
        found.curve(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "queries"), [("gemma2", 29), ("bert", 29)])
def test_both_ways_to_divide_equal_their_twins_on_the_models_own_attention(name, queries):
    network = build(name)
    ids = torch.randint(3, 97, (1, queries), generator=torch.Generator().manual_seed(5))
    trace = lens.capture(lens.load(network), ids.tolist(), statistics=["received"])
    network.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.stack(network(ids, output_attentions=True).attentions)[:, 0].double().numpy()
    for key in (0, 5, 12):
        seen = (p[..., key] > 0).any(1).sum(-1, keepdims=True)  # by any head
        every = queries - key if name == "gemma2" else queries
        for normalise, divisor in (("visible", seen), ("all", every)):
            expected = p[..., key].sum(-1) / divisor
            if normalise == "visible" and key and (seen < 16).any():
                with pytest.raises(LensError, match="needs 16"):
                    lens.sinks.rate(trace, key=key)
                continue
            found = lens.sinks.rate(trace, key=key, epsilon=0.1, normalise=normalise)
            np.testing.assert_allclose(found.alpha, expected, rtol=1e-4)
            assert found.value == (expected > 0.1).mean()


@pytest.mark.parametrize("length", ALPHA_OF_FIRST)
def test_uniform_attention_has_the_alpha_of_the_harmonic_numbers(length):
    profile = lens.sinks.find(trace_of(uniform(length)), epsilon=0.3).profile
    harmonic = np.concatenate([[0], np.cumsum(1 / np.arange(1, length + 1))])
    expected = (harmonic[-1] - harmonic[:-1]) / (length - np.arange(length))
    scored = max(1, length - 15)
    np.testing.assert_allclose(profile.alpha[0, 0, :scored], expected[:scored], atol=1e-6)
    assert profile.alpha[0, 0, 0] == pytest.approx(ALPHA_OF_FIRST[length], abs=1e-6)
    assert np.isnan(profile.alpha[0, 0, scored:]).all()
    assert np.nanmax(profile.rate) == 0


def test_uniform_attention_at_64_by_the_published_numbers():
    alpha = lens.sinks.find(trace_of(uniform(64))).profile.alpha[0, 0]
    assert alpha[[0, 1, 31]] == pytest.approx([0.0741233, 0.0594268, 0.0217165], abs=1e-6)


def test_a_model_without_positions_is_uniform_on_a_repeated_token():
    """METHODS-ATTENTION 9.12: equal states at every position leave each row nothing to choose by."""
    network = build("gpt2")
    torch.nn.init.zeros_(network.transformer.wpe.weight)
    traces: Any = lens.capture(lens.load(network), [[5] * 64], statistics=["received"])
    trace = traces[0]
    alpha = lens.sinks.find(trace).profile.alpha[..., [0, 1, 31]]
    expected = np.broadcast_to([0.0741233, 0.0594268, 0.0217165], alpha.shape)
    np.testing.assert_allclose(alpha, expected, atol=1e-6)
    assert lens.sinks.rate(trace).value == 0


@pytest.mark.parametrize(("mass", "expected"), [(0.2885, 0.0), (0.2893, 1.0)])
def test_a_constant_mass_crosses_the_threshold_where_it_must(mass, expected):
    """alpha_1 = (1 + (T - 1) m) / T exceeds 0.3 from m = 0.288889 on, at T = 64."""
    result = lens.sinks.rate(trace_of(parked(64, mass)))
    assert result.alpha[0, 0] == pytest.approx((1 + 63 * mass) / 64, abs=1e-6)
    assert result.value == expected


def test_the_threshold_is_strict():
    trace = trace_of(np.eye(20)[None, None])  # alpha of the first key is 1/20 exactly
    result = lens.sinks.rate(trace, epsilon=0.06)
    assert result.alpha[0, 0] == pytest.approx(0.05)
    p = np.zeros((1, 1, 32, 32))
    p[0, 0, :, 0] = 0.5
    assert lens.sinks.rate(trace_of(p), epsilon=0.5).value == 0
    assert lens.sinks.rate(trace_of(p), epsilon=0.499).value == 1


def test_a_diagonal_head_has_no_sinks_at_its_end():
    found = lens.sinks.find(trace_of(np.eye(67)[None, None]))
    assert found.keys == []
    assert found.heads == []
    assert np.isnan(found.profile.rate).sum() == 15


def test_thresholding_first_and_averaging_first_are_two_metrics():
    """alpha 0.5 and 0.05 (roughly): each sample on its own says 1 and 0, their mean 0.275 says 0."""
    traces = [trace_of(parked(67, 0.5)), trace_of(parked(67, 0.03))]
    by_sample = lens.sinks.rate(traces)
    assert (by_sample.value, by_sample.low, by_sample.high) == (0.5, 0, 1)
    assert by_sample.by_head.tolist() == [[0.5]]
    pooled = lens.sinks.rate(traces, reduce="alpha_first")
    assert pooled.value == 0
    assert np.isnan(pooled.low)
    assert np.array_equal(pooled.alpha, by_sample.alpha)


def test_the_rate_equals_its_naive_twin():
    samples = [probabilities(3, 5, 43, seed) ** 2 for seed in range(7)]
    samples = [p / p.sum(-1, keepdims=True) for p in samples]
    for key in (0, 11):
        hits = [
            p[layer, head, key:, key].mean() > 0.09
            for p in samples
            for layer in range(3)
            for head in range(5)
        ]
        result = lens.sinks.rate([trace_of(p) for p in samples], key=key, epsilon=0.09)
        assert 0 < result.value < 1
        assert result.value == pytest.approx(np.mean(hits))
        assert result.by_head.mean() == pytest.approx(np.mean(hits))
        assert result.low <= result.value <= result.high


def test_find_names_the_key_the_head_and_the_token():
    p = np.concatenate([parked(67, 0.4, key=13), parked(67, 0.9), np.eye(67)[None, None]], axis=1)
    p = np.concatenate([np.broadcast_to(np.eye(67), (1, 3, 67, 67)), p])
    found = lens.sinks.find(trace_of(p))
    assert found.table()[["layer", "head", "key", "token"]].to_numpy().tolist() == [
        [1, 1, 0, "t0"],
        [1, 0, 13, "t3"],
    ]
    assert found.rows["alpha"].tolist() == pytest.approx(
        [(1 + 66 * 0.9) / 67, (1 + 53 * 0.4) / 54], abs=1e-6
    )
    assert found.keys == [0, 13]
    assert [str(head) for head in found.heads] == ["L1H0", "L1H1"]
    several = lens.sinks.find([trace_of(p[:, :2]), trace_of(p[:, ::-1][:, :2])]).table()
    assert several[["prompt", "name", "key"]].to_numpy().tolist() == [
        [0, "L1H1", 0],
        [0, "L1H0", 13],
        [1, "L1H1", 0],
    ]


def test_a_profile_over_positions_finds_a_common_sink():
    traces = [trace_of(parked(67, mass, key=13)) for mass in (0.4, 0.5, 0.1)]
    profile = lens.sinks.find(traces).profile
    assert profile.rate[13] == pytest.approx(2 / 3)
    assert profile.common() == [13]
    assert profile.common(0.7) == []
    table = profile.table()
    assert table["largest_alpha"].idxmax() == 13
    assert (table["n"] == 3).all()


def test_sensitivity_falls_with_epsilon_and_equals_the_rate():
    traces = [trace_of(parked(67, mass)) for mass in (0.2, 0.5, 0.8)]
    curve = lens.sinks.rate(traces).curve([0.01, 0.1, 0.3, 0.6, 0.9])
    assert curve.epsilons.tolist() == [0.1, 0.3, 0.6, 0.9]  # 0.01 < 1/67 says nothing
    assert curve.values == pytest.approx([1, 2 / 3, 1 / 3, 0])
    expected = [lens.sinks.rate(traces, epsilon=epsilon).value for epsilon in curve.epsilons]
    assert curve.values.tolist() == expected
    assert (np.diff(lens.sinks.rate(traces).curve().values) <= 0).all()


def test_every_table_tells_what_the_number_depends_on():
    traces = [trace_of(parked(67, 0.5), bos="added") for _ in range(2)]
    for result in (
        lens.sinks.rate(traces),
        lens.sinks.rate(traces).curve(),
        lens.sinks.find(traces).profile,
    ):
        table = result.table()
        assert set(table["tokens"]) == {67}
        assert set(table["bos"]) == {"added"}
        assert set(table["n"]) == {2}
        assert "epsilon" in table
        assert set(table["normalise"]) == {"visible"}
        assert "T = 67, BOS added, n = 2" in result.findings()[0]


def test_figures_show_the_numbers():
    traces = [trace_of(parked(67, mass)) for mass in (0.2, 0.5)]
    rate = lens.sinks.rate(traces)
    grid = rate.plot()
    assert np.array_equal(grid.data[0].z, rate.alpha)
    assert "T = 67" in grid.layout.title.text
    curve = lens.sinks.rate(traces).curve()
    assert np.array_equal(curve.plot().data[0].y, curve.values)
    assert curve.plot().data[0].error_y.array is not None
    assert lens.sinks.rate(traces[0]).curve().plot().data[0].error_y.array is None
    profile = lens.sinks.find(traces).profile
    drawn = profile.plot().data[0].z
    assert np.array_equal(drawn, profile.alpha.mean(1), equal_nan=True)
    found = lens.sinks.find(traces[1])
    assert found.plot().data[0].x.tolist() == [0]
    none = lens.sinks.find(trace_of(np.eye(67)[None, None]))
    assert list(none.plot().data[0].x) == []


# --- real models --------------------------------------------------------------------------------


def _chunks(model, name: str, tokens: int, count: int) -> list[list[int]]:
    """`count` prompts of a text, each beginning with the model's BOS where it has one."""
    ids = model.encode(lens.tasks.text(name))
    start, bos = (1, ids[:1]) if ids[0] == model.bos_id else (0, [])
    body = tokens - len(bos)
    return [bos + ids[start + 40 * i * body : start + (40 * i + 1) * body] for i in range(count)]


def _rate(name: str, prompts):
    return lens.sinks.rate(lens.capture(lens.load(name), prompts, statistics=["received"]))


def test_text_lm_has_its_sinks_on_text_and_none_on_random_tokens():
    model = lens.load("text-lm-3l")
    result = _rate("text-lm-3l", _chunks(model, "moby-dick", 96, 6))
    assert result.samples.bos == "added"
    assert result.by_head[1, 0] == 1
    assert result.alpha[1, 0] > 0.7
    assert result.alpha[1].argmax() == 0
    assert result.by_head[[0, 2]].max() == 0
    random = np.random.default_rng(3).integers(1, 512, (6, 95))
    noise = _rate("text-lm-3l", [[0, *row] for row in random.tolist()])
    assert noise.value == 0
    assert noise.alpha[1, 0] < 0.3


def test_induction_2l_parks_on_bos_while_nothing_repeats():
    model = lens.load("induction-2l")
    found = _rate("induction-2l", [lens.tasks.copied(model, 25, seed)[:26] for seed in range(6)])
    assert found.by_head[1, [0, 2, 3]].tolist() == [1, 1, 1]
    assert found.by_head[0, 1] == 0  # its previous-token head


def test_stories260k_has_none():
    model = lens.load("stories260k")
    text = "Once upon a time there was a girl who had a big red ball. " * 9
    result = _rate("stories260k", [model.encode(text)[:64]])
    assert result.value == 0


# --- refusals -------------------------------------------------------------------------------------


def test_refusals():
    trace = trace_of(parked(67, 0.5))
    with pytest.raises(LensError, match="at least one trace, got an empty list"):
        lens.sinks.rate([])
    with pytest.raises(LensError, match=r"compare only at one number of tokens.*43, 67"):
        lens.sinks.rate([trace, trace_of(parked(43, 0.5))])
    with pytest.raises(LensError, match=r"compare only at one BOS.*absent.*added"):
        lens.sinks.find([trace, trace_of(parked(67, 0.5), bos="added")])
    with pytest.raises(LensError, match="need received; capture it"):
        lens.sinks.find(trace_of(parked(67, 0.5), without=["received"]))
    with pytest.raises(LensError, match="key must be a position 0 to 66, got 67"):
        lens.sinks.rate(trace, key=67)
    with pytest.raises(LensError, match=r"key 60 is seen by 7 queries .* needs 16"):
        lens.sinks.rate(trace, key=60)
    with pytest.raises(LensError, match=r"epsilon must lie between 0 and 1, got 1.5"):
        lens.sinks.rate(trace, epsilon=1.5)
    with pytest.raises(
        LensError, match=r"epsilon 0.3 says nothing here: the first key receives at least 0.333"
    ):
        lens.sinks.rate(trace_of(np.eye(3)[None, None]))
    with pytest.raises(LensError, match=r"epsilon 0.01 says nothing here: .* at least 0.0149"):
        lens.sinks.find(trace, epsilon=0.01)
    with pytest.raises(
        LensError, match="reduce must be one of 'sample_first', 'alpha_first', got 'mean'"
    ):
        lens.sinks.rate(trace, reduce="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LensError, match=r"no epsilon of .0.01. exceeds 0.0149"):
        lens.sinks.rate(trace).curve([0.01])
    with pytest.raises(LensError, match="normalise must be one of 'visible', 'all', got 'T'"):
        lens.sinks.rate(trace, normalise="T")  # pyright: ignore[reportArgumentType]
    short = trace_of(windowed(67, 3), windows=[3])
    with pytest.raises(LensError, match=r"at least 0.333 by definition.*normalise='all' where"):
        lens.sinks.rate(short)
    assert lens.sinks.rate(short, normalise="all").value == 0
