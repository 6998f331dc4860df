"""One edit by its rule: equal to a twin on whole probabilities."""

import math

import numpy as np
import pytest
import torch

from lens.edits.editing import Edit
from lens.passes.calls import LayerCall
from lens.passes.masks import MaskStructure
from tests.lens.naive import rms_ratio

AMOUNTS = {
    "mask": (0.3, 1.0),
    "drop": (0.3, 1.0),
    "transfer": (0.3, 1.0),
    "logit_bias": (-math.inf, -4.6, 1.3),
    "learned_sink": (1.0, 7.5),
}


def visible(queries: int, keys: int, causal: bool, window: int | None) -> np.ndarray:
    i = np.arange(keys - queries, keys)[:, None]
    j = np.arange(keys)[None]
    far = np.abs(i - j) if not causal else i - j
    return ((j <= i) | (not causal)) & (far < (window or keys + 1))


def twin(call: LayerCall, rule: str, amount: float, sources, targets, heads):
    """Output [batch, queries, heads, dim] and skipped rows, in float64, from the whole matrix."""
    q, k, v = (x.double().numpy() for x in (call.query, call.key, call.value))
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat(share, 1), v.repeat(share, 1)
    s = call.scale * q @ k.swapaxes(-1, -2)
    s[..., ~visible(q.shape[2], k.shape[2], call.mask.causal, call.mask.window)] = -np.inf
    plain = np.exp(s)
    model_sink = 0 if call.sink_logits is None else np.exp(call.sink_logits.numpy())[:, None, None]
    p = plain / (plain.sum(-1, keepdims=True) + model_sink)
    in_s, in_t = (np.isin(np.arange(p.shape[-1]), x) for x in (sources, targets))
    if rule == "transfer" and not len(targets):
        in_t = ~in_s
    m_s, m_t = (p[..., member].sum(-1, keepdims=True) for member in (in_s, in_t))
    skipped = np.zeros(p.shape[:3], bool)
    if rule in ("mask", "drop"):
        new = np.where(in_s, p * (1 - amount), p)
        if rule == "mask":
            left = new.sum(-1, keepdims=True)
            skipped = (left[..., 0] < 1e-8) & (m_s[..., 0] > 0)
            total = plain.sum(-1, keepdims=True) + model_sink
            scaled = np.where(in_s, plain * (1 - amount), plain)
            new = scaled / np.where(left < 1e-8, 1, scaled.sum(-1, keepdims=True) + model_sink)
            assert total.min() > 0
    elif rule == "logit_bias":
        scaled = np.where(in_s, plain * np.exp(amount), plain)
        left = scaled.sum(-1, keepdims=True)
        skipped = (left[..., 0] < 1e-8) & (m_s[..., 0] > 0)
        new = scaled / np.where(left < 1e-8, 1, left + model_sink)
    elif rule == "transfer":
        skipped = (m_t[..., 0] < 1e-8) & (m_s[..., 0] > 0)
        gain = 1 + amount * m_s / np.where(m_t < 1e-8, 1, m_t)
        new = np.where(in_s, p * (1 - amount), np.where(in_t, p * gain, p))
    else:
        new = plain / (plain.sum(-1, keepdims=True) + model_sink + amount)
    new = np.where(skipped[..., None], p, new)
    chosen = np.isin(np.arange(q.shape[1]), heads)[:, None, None]
    return (np.where(chosen, new, p) @ v).swapaxes(1, 2), skipped & chosen[..., 0]


def call_of(kv_heads=2, queries=37, keys=37, causal=True, window=None, sinks=False, seed=0):
    """One attention call of 6 heads, with a key that takes most of the mass."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 6, queries, 11, generator=random)
    key, value = (torch.randn(2, kv_heads, keys, 11, generator=random) for _ in range(2))
    key[:, :, 0] = 2 * query[:, :kv_heads].mean(2)
    logits = torch.randn(6, generator=random) if sinks else None
    mask = MaskStructure(causal, window)
    return LayerCall(query, key, value, mask, 11**-0.5, sink_logits=logits)


def edit_of(rule, amount, sources, targets=(), heads=(0, 1, 2, 3, 4, 5)) -> Edit:
    chosen = torch.zeros(1, 6, dtype=torch.bool)
    chosen[0, list(heads)] = True
    given = None if rule == "learned_sink" else list(sources)
    return Edit(given, list(targets) or None, amount, rule, chosen, "auto")


CASES = [(rule, amount) for rule, amounts in AMOUNTS.items() for amount in amounts]


@pytest.mark.parametrize(("rule", "amount"), CASES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kv_heads": 6},
        {"causal": False},
        {"window": 13},
        {"queries": 5},
        {"queries": 1, "keys": 41},
        {"sinks": True},
    ],
    ids=lambda shape: ",".join(f"{key}={value}" for key, value in shape.items()) or "gqa",
)
def test_every_rule_equals_its_twin_on_whole_probabilities(rule, amount, shape):
    call = call_of(**shape)
    sources, targets = [0, 7, 23], [5, 19] if rule == "transfer" else []
    heads = [0, 1, 3, 5]
    edit = edit_of(rule, amount, sources, targets, heads)
    output = edit.on_layer(call).transpose(1, 2)
    expected, skipped = twin(call, rule, amount, sources, targets, heads)
    unedited, _ = twin(call, "drop", 0.0, sources, [], heads)
    assert rms_ratio(output, expected) < 1e-5
    assert rms_ratio(output[:, :, heads], unedited[:, :, heads]) > 1e-3
    assert edit.skipped_rows == skipped.sum()
    assert edit.calls == 1


def test_targets_left_out_are_all_other_keys():
    call = call_of()
    output = edit_of("transfer", 0.7, [0]).on_layer(call).transpose(1, 2)
    expected, skipped = twin(call, "transfer", 0.7, [0], [], range(6))
    assert rms_ratio(output, expected) < 1e-5
    assert skipped.sum() == 2 * 6  # the first query sees nothing else


@pytest.mark.parametrize(("rule", "amount"), CASES)
def test_heads_that_are_not_chosen_keep_their_bits(rule, amount):
    call = call_of()
    plain = edit_of("mask", 0.0, [0]).on_layer(call).transpose(1, 2)
    edited = edit_of(rule, amount, [0, 7], heads=[1, 4]).on_layer(call).transpose(1, 2)
    others = [0, 2, 3, 5]
    assert torch.equal(edited[:, :, others], plain[:, :, others])
    assert not torch.equal(edited[:, :, [1, 4]], plain[:, :, [1, 4]])


def test_masses_are_counted():
    call = call_of(kv_heads=6)
    edit = edit_of("transfer", 0.25, [0], [5])
    edit.on_layer(call).transpose(1, 2)
    scores = call.scale * call.query @ call.key.transpose(-1, -2)
    hidden = ~torch.from_numpy(visible(37, 37, True, None))
    sink = scores.masked_fill(hidden, -math.inf).softmax(-1)[..., 0]
    assert edit.mass_before == pytest.approx(float(sink.mean()), rel=1e-5)
    sink[..., 5:] *= 0.75  # queries 0 to 4 do not see the target
    assert edit.mass_after == pytest.approx(float(sink.mean()), rel=1e-5)
    assert edit.skipped_rows == 2 * 6 * 5
    assert edit.edited_rows == 2 * 6 * 32


@pytest.mark.parametrize(
    ("rule", "amount"), [("mask", 1.0), ("transfer", 1.0), ("logit_bias", -math.inf)]
)
def test_rows_with_nowhere_to_put_the_mass_stay_and_are_counted(rule, amount):
    """With every key a source (or no target at all) nothing may become NaN, and nothing changes."""
    call = call_of()
    plain = edit_of("mask", 0.0, [0]).on_layer(call).transpose(1, 2)
    targets = [99] if rule == "transfer" else []
    edit = edit_of(rule, amount, range(37), targets)
    assert rms_ratio(edit.on_layer(call).transpose(1, 2), plain) < 1e-6
    assert edit.skipped_rows == 2 * 6 * 37
    assert edit.edited_rows == 0
    none = edit_of(rule, amount, [])
    assert torch.equal(none.on_layer(call).transpose(1, 2), plain)
    assert (none.empty_calls, none.calls, none.skipped_rows) == (1, 0, 0)
    assert math.isnan(none.mass_before)


def test_a_planted_sink_in_bfloat16_is_edited_without_loss():
    """Mass 0.5 to 0.999 on key 0: masked, the row is the mean of the other values."""
    for mass in (0.5, 0.9, 0.99, 0.999):
        value = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(1))
        key = torch.zeros(1, 1, 64, 16)
        key[..., 0, 0] = math.log(mass / (1 - mass) * 63)
        query = torch.zeros(1, 1, 1, 16)
        query[..., 0] = 1
        parts = [tensor.bfloat16() for tensor in (query, key, value)]
        call = LayerCall(*parts, MaskStructure(True), 1.0)
        chosen = torch.ones(1, 1, dtype=torch.bool)
        output = Edit([0], None, 1.0, "mask", chosen, "auto").on_layer(call).transpose(1, 2)
        expected = parts[2][0, 0, 1:].float().mean(0)
        assert rms_ratio(output[0, 0, 0].float(), expected) < 3e-3
