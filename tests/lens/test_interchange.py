"""Imported attention: the same trace as capture's, from TransformerLens too, and refusals."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.traces import from_attentions, from_transformer_lens
from lens.traces.trace import AttentionTrace
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio
from tests.lens.naive import statistics as naive
from tests.lens.traces import probabilities

LENGTH, BLOCK = 29, 8
FROM_LOGITS = {"lse", "max_logit"}


def some_ids(length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 11, (length,), generator=generator).tolist()  # few, so that some repeat


def attentions_of(model, ids, **inputs):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), output_attentions=True, **inputs).attentions


def agree(trace: AttentionTrace, captured: AttentionTrace):
    names = set(captured.dataset.data_vars) - FROM_LOGITS
    assert set(trace.dataset.data_vars) == names
    for name in names:
        assert rms_ratio(trace.dataset[name], captured.dataset[name]) < 1e-5, name
        assert trace.dataset[name].dims == captured.dataset[name].dims


@pytest.mark.parametrize(
    ("name", "windows"),
    [("gpt2", None), ("llama", None), ("gemma2", [11, None, 11]), ("bert", None)],
)
def test_an_imported_trace_equals_the_captured_one(name, windows):
    ids = some_ids()
    captured = lens.capture(lens.load(build(name)), ids, block_size=BLOCK)
    trace = from_attentions(
        attentions_of(build(name), [ids]), token_ids=ids, windows=windows, block_size=BLOCK
    )
    agree(trace, captured)
    assert trace.attrs["causal"] == captured.attrs["causal"]
    assert trace.attrs["windows"] == captured.attrs["windows"]
    assert "computed from given" in trace.attrs["origin"]


def test_a_padded_row_of_a_batch_is_the_prompt_alone():
    short, long = some_ids(19, seed=2), some_ids()
    padded = [0] * 10 + short
    mask = [0] * 10 + [1] * 19
    model = build("llama")
    attentions = attentions_of(
        model, [long, padded], attention_mask=torch.tensor([[1] * LENGTH, mask])
    )
    trace = from_attentions(attentions, token_ids=padded, row=1, padding=mask, block_size=BLOCK)
    captured = lens.capture(lens.load(build("llama")), short, block_size=BLOCK)
    agree(trace, captured)
    assert trace.dataset["token_id"].values.tolist() == short


def test_a_transformer_lens_cache_gives_the_same_trace():
    p = probabilities(2, 3, 17, seed=4).astype(np.float32)
    ids = some_ids(17)
    cache = {f"blocks.{layer}.attn.hook_pattern": torch.tensor(p[layer])[None] for layer in (1, 0)}
    cache["blocks.0.attn.hook_z"] = torch.zeros(1)
    expected = from_attentions(list(p[:, None]), token_ids=ids, block_size=5)
    found = from_transformer_lens(cache, token_ids=ids, block_size=5)
    without_batch = {name: tensor[0] for name, tensor in cache.items()}
    again = from_transformer_lens(without_batch, token_ids=ids, block_size=5)
    for trace in (found, again):
        for name in expected.dataset.data_vars:
            np.testing.assert_array_equal(trace.dataset[name], expected.dataset[name])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [2, 23])
def test_statistics_are_those_of_the_naive_twin(causal, length):
    p = probabilities(1, 3, length, seed=5, causal=causal)
    ids = some_ids(length)
    found = from_attentions(list(p[:, None]), token_ids=ids, block_size=BLOCK)
    assert found.attrs["causal"] == causal
    for name, expected in naive(p[0], ids, BLOCK, found.attrs["causal"]).items():
        value = found.dataset[name].values[0]
        if np.abs(np.nan_to_num(expected)).max() < 1e-12:  # nothing there, or not scored
            np.testing.assert_array_equal(np.isnan(value), np.isnan(expected))
            assert np.abs(np.nan_to_num(value)).max() < 1e-12
        else:
            assert rms_ratio(value, expected) < 1e-6, name


def test_a_single_token_has_nothing_beside_its_sink():
    captured = lens.capture(lens.load(build("llama")), [5], block_size=BLOCK)
    trace = from_attentions([np.ones((1, 6, 1, 1))] * 3, token_ids=[5], block_size=BLOCK)
    for name in trace.dataset.data_vars:
        np.testing.assert_allclose(trace.dataset[name], captured.dataset[name], atol=1e-6)
    assert np.isnan(trace.distance_sink_excluded).all()


def test_without_ids_scores_that_compare_tokens_are_not_scored():
    trace = from_attentions(list(probabilities(1, 2, 9, seed=0)[:, None]))
    match = trace.match_mass
    assert np.isfinite(match.sel(match=["current_token_position", "previous_token"])).all()
    assert np.isnan(match.sel(match=["same_token", "induction"])).all()
    assert trace.tokens == [str(i) for i in range(9)]


def test_what_needs_logits_is_absent_and_tiles_say_why():
    trace = from_attentions(list(probabilities(1, 2, 9, seed=0)[:, None]))
    with pytest.raises(AttributeError, match="no lse"):
        _ = trace.lse
    assert "exact tiles need q, k and lse" in trace.tile_refusal(0, 0)


def test_an_imported_trace_is_profiled_saved_and_loaded(tmp_path):
    ids = [1, *some_ids(20)]
    p = probabilities(2, 3, 21, seed=7)
    trace = from_attentions(list(p[:, None]), token_ids=ids, bos_id=1, model="theirs")
    assert trace.attrs["bos"] == "added"
    profile = lens.profile(trace)
    expected = np.mean([np.diagonal(p[1, 2], -1)])
    row = profile[(profile["layer"] == 1) & (profile["head"] == 2)]
    assert row["previous_token"].item() == pytest.approx(expected, abs=1e-6)
    again = AttentionTrace.load(trace.save(tmp_path / "trace"))
    assert again.attrs["backend"] == "imported"
    np.testing.assert_array_equal(again.dataset["received"], trace.dataset["received"])


def test_half_precision_rows_are_taken():
    p = torch.tensor(probabilities(1, 2, 33, seed=3)).to(torch.bfloat16)
    trace = from_attentions([p])
    assert trace.attrs["dtype"] == "bfloat16"
    assert rms_ratio(trace.received[0], p[0].double().sum(1)) < 1e-6


def good():
    return probabilities(2, 3, 7, seed=1)[:, None]


def spoiled(change):
    p = good()
    change(p)
    return list(p)


def set_nan(p):
    p[1, 0, 2, 6, 6] = np.nan


def set_negative(p):
    p[0, 0, 1, 6, 5] = -0.1


def scale_row(p):
    p[1, 0, 0, 4] *= 0.9


CASES = [
    (lambda: from_attentions("abc"), "attentions must be a tuple .* got str"),
    (lambda: from_attentions([]), "attentions is empty"),
    (lambda: from_attentions([None]), r"layer 0 must be \[batch, heads, n, n\], got NoneType"),
    (lambda: from_attentions([np.ones((1, 2, 1, 5))]), r"got shape \[1, 2, 1, 5\]"),
    (
        lambda: from_attentions([*good(), probabilities(1, 2, 9, 0)]),
        "all layers must have one shape",
    ),
    (lambda: from_attentions([probabilities(3, 2, 7, 0)]), "the batch has 3 rows; choose one"),
    (lambda: from_attentions(list(good()), row=1), "row must be 0 to 0, got 1"),
    (lambda: from_attentions([np.ones((1, 1, 1, 1), int)]), "must be floats, got int64"),
    (lambda: from_attentions(spoiled(set_nan)), "L1H2 has NaN"),
    (lambda: from_attentions(spoiled(set_negative)), "L0H1 has negative entries"),
    (lambda: from_attentions(spoiled(scale_row)), "row 4 of L1H0 sums to 0.9 instead of 1"),
    (lambda: from_attentions(list(good()), token_ids=[1]), "token_ids must have 7 entries"),
    (lambda: from_attentions(list(good()), tokens=["a"]), "tokens must have 7 entries"),
    (lambda: from_attentions(list(good()), padding=[0] * 7), "with 0 real ones"),
    (lambda: from_attentions(list(good()), windows=[3]), "windows must have 2 entries"),
    (
        lambda: from_attentions(list(good()), windows=[None, 3]),
        "layer 1 attends at a distance of 3",
    ),
    (lambda: from_attentions(list(good()), block_size=0), "block_size must be a positive integer"),
    (lambda: from_transformer_lens([1]), "cache must map hook names to tensors, got list"),  # type: ignore[arg-type]
    (lambda: from_transformer_lens({"hook_embed": 1}), "holds no blocks.L.attn.hook_pattern"),
    (
        lambda: from_transformer_lens({"blocks.1.attn.hook_pattern": good()[0]}),
        r"lacks the patterns of layers \[0\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_what_are_no_probabilities_is_refused(call, message):
    with pytest.raises(LensError, match=message):
        call()
