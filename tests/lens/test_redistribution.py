"""`lens.redistribute`: equal to a twin on whole probabilities, in any model, at every decoding step."""

import math

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.edits.editing import Edit
from lens.passes.calls import LayerCall
from lens.passes.masks import MaskStructure
from tests.lens.architectures import build
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


# --- in models ------------------------------------------------------------------------------------


def loaded(architecture: str):
    model = build(architecture)
    return lens.load(model), torch.randint(
        3, 97, (1, 29), generator=torch.Generator().manual_seed(5)
    )


def logits_of(model, ids, **edit):
    with torch.no_grad(), lens.redistribute(model, **edit) as done:
        return model.model(input_ids=ids).logits, done


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gpt_oss", "gemma2"])
def test_an_amount_of_zero_keeps_the_bits_of_the_captured_model(architecture):
    model, ids = loaded(architecture)
    with torch.no_grad(), lens.traces.capturing(model, statistics=["received"]):
        captured = model.model(input_ids=ids).logits
    for rule in AMOUNTS:
        sources = None if rule == "learned_sink" else "first"
        same, edit = logits_of(model, ids, sources=sources, amount=0, rule=rule)
        assert torch.equal(same, captured), rule
        assert edit.calls == 0
    nothing, edit = logits_of(model, ids, sources=[], amount=1.0, rule="mask")
    assert torch.equal(nothing, captured)
    assert edit.empty_calls == 3
    edited, edit = logits_of(model, ids, sources="first", amount=0.7)
    assert rms_ratio(edited, captured) > 1e-6
    assert edit.calls == 3


def test_masking_the_first_key_is_what_the_model_does_with_a_mask():
    """transformers itself, with key 0 hidden from all rows but its own."""
    model, ids = loaded("llama")
    allowed = torch.ones(1, 1, 29, 29, dtype=torch.bool).tril()
    allowed[..., 1:, 0] = False
    with torch.no_grad():
        expected = model.model(input_ids=ids, attention_mask=allowed).logits
    for sources in ("first", [0], torch.arange(29) == 0, lambda at: at.positions == 0):
        edited, edit = logits_of(model, ids, sources=sources, amount=1.0, rule="mask")
        assert rms_ratio(edited, expected) < 1e-5
        assert edit.skipped_rows == 3 * 6  # the first query of each head


def test_layers_and_heads_select_what_is_edited():
    model, ids = loaded("llama")
    with torch.no_grad(), lens.traces.capturing(model, statistics=["received"]):
        captured = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    with torch.no_grad(), lens.redistribute(model, sources=[3], amount=0.9, layers=[1]) as edit:
        edited = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(edited[1], captured[1])
    assert not torch.equal(edited[2], captured[2])
    assert edit.calls == 1
    one, _ = logits_of(model, ids, sources=[3], amount=0.9, heads=["L1H2"])
    all_of_layer, _ = logits_of(
        model, ids, sources=[3], amount=0.9, heads=[(1, h) for h in range(6)]
    )
    by_layer, _ = logits_of(model, ids, sources=[3], amount=0.9, layers=[1])
    assert torch.equal(all_of_layer, by_layer)
    assert not torch.equal(one, by_layer)


def test_a_function_of_the_layer_sees_positions_and_tokens():
    model, ids = loaded("llama")
    seen = []

    def where(at):
        seen.append((at.layer, at.step, at.positions.tolist(), at.tokens.tolist()))
        return at.positions == 2 + at.layer

    with torch.no_grad(), lens.redistribute(model, sources=where, amount=1.0, rule="mask") as edit:
        model.model(input_ids=ids)
    assert seen == [(layer, 0, [list(range(29))], ids.tolist()) for layer in range(3)]
    assert edit.mass_after == 0


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_each_decoding_step_is_edited_as_the_whole_sequence_is(architecture):
    """Cached steps of one token give the rows of one pass over all tokens, windows included."""
    model, ids = loaded(architecture)
    edit = {"sources": [0, 4, 21], "targets": [2, 24, 25], "amount": 0.8}
    whole, _ = logits_of(model, ids, **edit)
    with torch.no_grad(), lens.redistribute(model, **edit) as done:
        first = model.model(input_ids=ids[:, :19], use_cache=True)
        rows, cache = [first.logits], first.past_key_values
        for place in range(19, 29):
            step = model.model(
                input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True
            )
            rows.append(step.logits)
    assert done.steps == 11
    assert rms_ratio(torch.cat(rows, 1), whole) < 1e-5


def test_left_padding_does_not_move_positions():
    model, ids = loaded("llama")
    edit = {"sources": "first", "targets": [2, 5], "amount": 0.8}
    plain, _ = logits_of(model, ids, **edit)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    real = (torch.arange(33) >= 4).long()[None]
    places = (torch.arange(33) - 4).clamp(min=0)[None]
    with torch.no_grad(), lens.redistribute(model, **edit):
        found = model.model(input_ids=padded, attention_mask=real, position_ids=places).logits
    assert rms_ratio(found[:, 4:], plain) < 1e-5


def test_generation_works_and_the_model_is_put_back():
    model = lens.load("text-lm-3l")
    ids = torch.tensor([model.encode("It was the best of times, it was the worst of")])
    before = model.model.config._attn_implementation
    plain = model.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with lens.redistribute(model, sources="first", amount=1.0, rule="mask") as edit:
        edited = model.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert edited.shape == plain.shape
    assert (edit.steps, edit.calls) == (8, 24)
    with (
        pytest.raises(RuntimeError, match="mine"),
        lens.redistribute(model, sources="first", amount=1.0),
    ):
        raise RuntimeError("mine")
    assert model.model.config._attn_implementation == before
    again = model.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(again, plain)


# --- refusals -------------------------------------------------------------------------------------


def refused(model, ids, match, **arguments):
    with pytest.raises(LensError, match=match):
        logits_of(model, ids, **arguments)


def test_arguments_that_do_not_fit_are_refused():
    model, ids = loaded("llama")
    for match, arguments in (
        ("rule must be one of mask, drop", {"sources": [0], "amount": 1.0, "rule": "zero"}),
        ("amount must be a number, got 'all'", {"sources": [0], "amount": "all"}),
        ("is a fraction 0..1, got 1.5", {"sources": [0], "amount": 1.5}),
        ("cannot be .inf", {"sources": [0], "amount": math.inf, "rule": "logit_bias"}),
        ("is exp.its logit., 0 or more, got -1", {"amount": -1, "rule": "learned_sink"}),
        ("'mask' has no targets", {"sources": [0], "targets": [1], "amount": 1, "rule": "mask"}),
        ("rule 'transfer' needs sources", {"amount": 1.0}),
        ("leave sources out", {"sources": [0], "amount": 1.0, "rule": "learned_sink"}),
        ("sources by name can only be 'first', got 'bos'", {"sources": "bos", "amount": 1.0}),
        ("targets must be 'first', positions from 0", {"sources": [0], "targets": [-1], "amount": 1}),
        (r"as a mask must be .positions., got \[1, 29\]", {"sources": ids > 5, "amount": 1.0}),
        ("both hold the positions .3.", {"sources": [2, 3], "targets": [3, 4], "amount": 1.0}),
        ("must return a bool tensor .1, 29. or .29., got list", {"sources": lambda at: [0], "amount": 1}),
        ("give layers or heads, not both", {"sources": [0], "amount": 1, "layers": [0], "heads": ["L0H0"]}),
        ("layers must be numbers 0 to 2, got 3", {"sources": [0], "amount": 1, "layers": [3]}),
        ("there is no L0H6", {"sources": [0], "amount": 1, "heads": ["L0H6"]}),
        ("unknown backend|backend", {"sources": [0], "amount": 1, "backend": "fast"}),
    ):  # fmt: skip
        refused(model, ids, match, **arguments)


def test_a_capture_inside_is_refused_because_it_would_undo_the_edit():
    model, ids = loaded("llama")
    with torch.no_grad(), lens.redistribute(model, sources=[0], amount=1.0) as edit:
        with pytest.raises(LensError, match=r"would not be edited: something inside the block"):
            lens.capture(model, [3, 4, 5, 6])
        steps = edit.steps
        model.model(input_ids=ids)  # the block goes on as before
        assert (edit.steps - steps, edit.calls) == (1, 3)


def test_a_cache_from_outside_is_refused_where_a_window_may_have_cut_it():
    model, ids = loaded("mistral")
    with torch.no_grad(), lens.traces.capturing(model, statistics=["received"]):
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
    with (
        pytest.raises(LensError, match="layer 0 has a window and a cache that began outside"),
        torch.no_grad(),
        lens.redistribute(model, sources=[0], amount=1.0),
    ):
        model.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
