"""`lens.edit`: equal to a twin on whole probabilities, one edit or several in order, at every step."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import lens
from lens import edits
from lens.common.errors import LensError
from lens.edits.base import selected_heads
from lens.edits.running import Together
from lens.passes.calls import LayerCall
from lens.passes.interface import switched
from lens.passes.structures import MaskStructure
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio
from tests.lens.traces import sizes

SIZES = SimpleNamespace(info=sizes(1, 6))


def visible(queries: int, keys: int, causal: bool, window: int | None) -> np.ndarray:
    i = np.arange(keys - queries, keys)[:, None]
    j = np.arange(keys)[None]
    far = np.abs(i - j) if not causal else i - j
    return ((j <= i) | (not causal)) & (far < (window or keys + 1))


def call_of(kv_heads=2, queries=37, keys=37, causal=True, window=None, sinks=False, seed=0):
    """One attention call of 6 heads, with a key that takes most of the mass."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 6, queries, 11, generator=random)
    key, value = (torch.randn(2, kv_heads, keys, 11, generator=random) for _ in range(2))
    key[:, :, 0] = 2 * query[:, :kv_heads].mean(2)
    logits = torch.randn(6, generator=random) if sinks else None
    mask = MaskStructure(causal, window)
    return LayerCall(query, key, value, mask, 11**-0.5, sink_logits=logits)


def run(call, *several):
    """Output [batch, heads, queries, dim] and counters."""
    started = [one.start(SIZES, "auto").attention for one in several]
    return Together(started, "auto").on_layer(call), started


def is_in(keys, count):
    return np.isin(np.arange(count), [0] if keys == "first" else keys)


def twin(call, *several):
    """Output [batch, heads, queries, dim] in float64: each edit on the whole P that the last one left.

    `gone` is what a row gives to no key: learned sinks, and what was dropped.
    """
    q, k, v = (x.double().numpy() for x in (call.query, call.key, call.value))
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat(share, 1), v.repeat(share, 1)
    queries, keys = q.shape[2], k.shape[2]
    s = call.scale * q @ k.swapaxes(-1, -2)
    seen = visible(queries, keys, call.mask.causal, call.mask.window)
    s[..., ~seen] = -np.inf
    weight = np.exp(s)
    model_sink = 0 if call.sink_logits is None else np.exp(call.sink_logits.numpy())[:, None, None]
    total = weight.sum(-1, keepdims=True) + model_sink
    p, gone = weight / total, model_sink / total
    values = np.broadcast_to(v[:, :, None], (*p.shape, v.shape[-1])).copy()
    for one in several:
        a = one.amount
        mine = np.zeros(6, bool)
        for head in range(6) if one.heads is None else one.heads:
            mine[head if isinstance(head, int) else int(head[3:])] = True
        rows = np.ones(queries, bool)
        if hasattr(one, "queries"):
            rows = is_in(one.queries, keys)[-queries:]
        active = mine[:, None, None] & rows[:, None]
        source = is_in(one.keys, keys) if hasattr(one, "keys") else np.ones(keys, bool)
        held = (p * source).sum(-1, keepdims=True)
        other = (p * ~source).sum(-1, keepdims=True)
        new, left, nv = p.copy(), gone * np.ones_like(held), values.copy()
        match one:
            case edits.Mask() | edits.Knockout() | edits.Bias():
                factor = math.exp(a) if isinstance(one, edits.Bias) else 1 - a
                if factor == 0:
                    active = active & ~((held > 0) & (other < 1e-8))
                new = np.where(source, p * factor, p)
                norm = new.sum(-1, keepdims=True) + left
                new, left = new / np.where(norm == 0, 1, norm), left / np.where(norm == 0, 1, norm)
            case edits.Drop():
                new, left = np.where(source, p * (1 - a), p), left + a * held
            case edits.Move():
                target = ~source if one.to is None else is_in(one.to, keys)
                takes = (p * target).sum(-1, keepdims=True)
                active = active & (takes >= 1e-8)
                gain = 1 + a * held / np.where(takes < 1e-8, 1, takes)
                new = np.where(source, p * (1 - a), np.where(target, p * gain, p))
            case edits.LearnedSink():
                z = (
                    1 / p.max(-1, keepdims=True) * weight.max(-1, keepdims=True)
                )  # of one edit alone
                new, left = p / (1 + a / z), (left + a / z) / (1 + a / z)
            case edits.Force():
                w = (
                    p * source / np.maximum(held, 1e-300)
                    if one.split == "own"
                    else source / source.sum() + 0 * p
                )
                new, left = (1 - a) * p + a * w, (1 - a) * left
            case edits.Value():
                mean = np.zeros_like(values)
                for i in range(queries):
                    fine = seen[i] & ~source
                    if one.baseline == "mean" and not fine.any():
                        mean[:, :, i] = values[:, :, i]
                    elif one.baseline == "mean":
                        mean[:, :, i] = v[:, :, fine].mean(2)[:, :, None]
                nv = np.where(source[:, None], (1 - a) * values + a * mean, values)
        p, gone = np.where(active, new, p), np.where(active, left, gone)
        values = np.where(active[..., None], nv, values)
    return np.einsum("bhqk,bhqkd->bhqd", p, values)


HEADS = [(0, 0), (0, 1), (0, 3), (0, 5)]
SINGLE = [
    edits.Mask([0, 7], 0.3),
    edits.Mask([0, 7, 23]),
    edits.Drop([0, 7, 23], 0.4),
    edits.Drop([0, 7]),
    edits.Bias([0, 23], -4.6),
    edits.Bias([7], 1.3),
    edits.Bias([0], -math.inf),
    edits.Move([0, 7], [5, 19], 0.6),
    edits.Move("first", None, 0.7),
    edits.LearnedSink(7.5),
    edits.Value([0, 7]),
    edits.Knockout([33, 36], [0, 7, 30]),
    edits.Force([34, 36], [0, 7, 30], 0.4),
    edits.Force([34, 36], [0, 7, 30], split="own"),
]
SHAPES = [{}, {"kv_heads": 6}, {"causal": False}, {"window": 13}, {"queries": 5}, {"sinks": True}]


def placed(one, heads=HEADS):
    return dataclasses.replace(one, heads=[f"L{layer}H{head}" for layer, head in heads])


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (one, shape)
        for one in SINGLE
        for shape in SHAPES
        if not (isinstance(one, edits.Force) and "window" in shape)  # refused: keys out of sight
    ],
    ids=str,
)
def test_every_edit_equals_its_twin_on_whole_probabilities(one, shape):
    call, one = call_of(**shape), placed(one)
    output, (done,) = run(call, one)
    assert rms_ratio(output, twin(call, one)) < 1e-5
    plain = twin(call)
    rows = slice(None) if not hasattr(one, "queries") else slice(-5, None)
    chosen = [head for _, head in HEADS]
    assert rms_ratio(output[:, chosen, rows], plain[:, chosen, rows]) > 1e-3
    assert done.calls == 1


@pytest.mark.parametrize("shape", [{}, {"window": 13}, {"queries": 5}], ids=str)
def test_a_value_becomes_the_mean_of_the_others_that_the_row_sees(shape):
    call, one = call_of(**shape), edits.Value([0, 7, 30], "mean", 0.8, heads=["L0H1", "L0H2"])
    output, _ = run(call, one)
    assert rms_ratio(output, twin(call, one)) < 1e-5
    assert rms_ratio(output[:, 1], twin(call)[:, 1]) > 1e-3


ORDERS = [
    (edits.Drop([0, 7], 0.6), edits.Mask([0, 23], 0.5)),
    (edits.Mask([0, 23], 0.5), edits.Drop([0, 7], 0.6)),
    (edits.LearnedSink(3.0), edits.Mask([0, 7]), edits.Move([1, 2], [5, 19], 0.5)),
    (edits.Move("first", [5, 19]), edits.Move([5], [20], 0.5), edits.Bias([20, 21], 1.0)),
    (edits.Value([0, 5]), edits.Move("first", None, 0.9), edits.Drop([5], 0.3)),
    (edits.Force([34, 35], [0, 7, 30], 0.5), edits.Mask([7]), edits.Value([30, 12])),
    (edits.Knockout([36], [0, 3]), edits.Force([35, 36], [3, 7], 0.4, split="own")),
]  # fmt: skip


@pytest.mark.parametrize("shape", [{}, {"queries": 5}, {"sinks": True}], ids=str)
@pytest.mark.parametrize(
    "several", ORDERS, ids=lambda some: "-".join(type(one).__name__ for one in some)
)
def test_several_edits_act_one_after_another_on_what_the_last_one_left(several, shape):
    """The second on fewer heads than the first: each head has its own sequence."""
    call = call_of(**shape)
    several = [placed(one, HEADS[number:]) for number, one in enumerate(several)]
    output, done = run(call, *several)
    assert rms_ratio(output, twin(call, *several)) < 1e-5
    back = (
        twin(call, *several[::-1]) if not isinstance(several[0], edits.LearnedSink) else twin(call)
    )
    assert rms_ratio(output, back) > 1e-4
    assert [one.calls for one in done] == [1] * len(several)


def test_the_order_of_drop_and_mask_matters_and_masks_among_themselves_do_not():
    call = call_of()
    one, other = edits.Mask([0], 0.5), edits.Mask([0, 7], 0.4)
    assert rms_ratio(run(call, one, other)[0], run(call, other, one)[0]) < 1e-6
    joint = run(call, edits.Mask([0], 0.7), edits.Mask([7], 0.4))[0]
    assert rms_ratio(run(call, one, other)[0], joint) < 1e-6
    drop = edits.Drop([0], 0.5)
    assert rms_ratio(run(call, drop, other)[0], run(call, other, drop)[0]) > 1e-3


def test_edits_of_different_heads_leave_each_other_and_the_rest_alone():
    call = call_of()
    mask, sink = edits.Mask("first", heads=["L0H1"]), edits.LearnedSink(2.0, heads=["L0H4"])
    both, _ = run(call, mask, sink)
    plain, _ = run(call, edits.Mask([], heads=["L0H1"]))
    assert torch.equal(both[:, 1], run(call, mask)[0][:, 1])
    assert torch.equal(both[:, 4], run(call, sink)[0][:, 4])
    assert torch.equal(both[:, [0, 2, 3, 5]], plain[:, [0, 2, 3, 5]])
    assert not torch.equal(both[:, [1, 4]], plain[:, [1, 4]])


def test_masses_and_rows_are_counted_per_edit():
    call = call_of(kv_heads=6)
    _, (drop, move) = run(call, edits.Drop("first", 0.5), edits.Move("first", [5], 0.25))
    scores = call.scale * call.query @ call.key.transpose(-1, -2)
    hidden = ~torch.from_numpy(visible(37, 37, True, None))
    sink = scores.masked_fill(hidden, -math.inf).softmax(-1)[..., 0]
    assert drop.mass_before == pytest.approx(float(sink.mean()), rel=1e-5)
    assert drop.mass_after == pytest.approx(float(sink.mean()) / 2, rel=1e-5)
    assert move.mass_before == pytest.approx(float(sink.mean()) / 2, rel=1e-5)
    assert (move.skipped_rows, move.edited_rows) == (2 * 6 * 5, 2 * 6 * 32)
    assert (drop.skipped_rows, drop.edited_rows) == (0, 2 * 6 * 37)


@pytest.mark.parametrize(
    "one", [edits.Mask(range(37)), edits.Move(range(37), [99]), edits.Bias(range(37), -math.inf)], ids=str
)  # fmt: skip
def test_rows_with_nowhere_to_put_the_mass_stay_and_are_counted(one):
    call = call_of()
    plain, (none,) = run(call, edits.Mask([]))
    output, (done,) = run(call, one)
    assert torch.equal(output, plain)
    assert (done.skipped_rows, done.edited_rows) == (2 * 6 * 37, 0)
    assert (none.empty_calls, none.calls) == (1, 0)
    assert math.isnan(none.mass_before)


def test_a_planted_sink_in_bfloat16_is_edited_without_loss():
    """Mass 0.9 to 0.9999 on key 0: masked, the row is the mean of the other values."""
    for mass in (0.9, 0.99, 0.9999):
        value = torch.randn(1, 6, 64, 16, generator=torch.Generator().manual_seed(1))
        key, query = torch.zeros(1, 6, 64, 16), torch.zeros(1, 6, 1, 16)
        key[..., 0, 0] = math.log(mass / (1 - mass) * 63)
        query[..., 0] = 1
        call = dataclasses.replace(
            call_of(), query=query.bfloat16(), key=key.bfloat16(), value=value.bfloat16(), scale=1.0
        )
        expected = call.value[:, :, 1:].float().mean(2)
        assert rms_ratio(run(call, edits.Mask("first"))[0][:, :, 0].float(), expected) < 3e-3


# --- in models ------------------------------------------------------------------------------------


def loaded(architecture="llama"):
    ids = torch.randint(3, 97, (1, 29), generator=torch.Generator().manual_seed(5))
    return lens.load(build(architecture)), ids


def logits(model, ids, *several):
    with torch.no_grad(), lens.edit(model, *several) as done:
        return model.model(input_ids=ids).logits, done


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_each_decoding_step_is_edited_as_the_whole_sequence_is(architecture):
    model, ids = loaded(architecture)
    several = [
        edits.Move([0, 4, 21], [2, 24, 25], 0.8),
        edits.Drop([2, 20], 0.5, heads=["L0H1", "L1H0"]),
        edits.Knockout([22, 23, 26], [21], layers=[1]),
        edits.Value([3, 20], "mean"),
    ]
    whole, _ = logits(model, ids, *several)
    with torch.no_grad(), lens.edit(model, *several) as done:
        first = model.model(input_ids=ids[:, :19], use_cache=True)
        rows, cache = [first.logits], first.past_key_values
        for place in range(19, 29):
            token = ids[:, place : place + 1]
            step = model.model(input_ids=token, past_key_values=cache, use_cache=True)
            rows.append(step.logits)
    assert [one.steps for one in done] == [11] * 4
    assert rms_ratio(torch.cat(rows, 1), whole) < 1e-5


def test_masking_the_first_key_is_what_the_model_does_with_a_mask():
    """transformers itself, with key 0 hidden from all rows but its own; from two rows only."""
    model, ids = loaded()
    allowed = torch.ones(1, 1, 29, 29, dtype=torch.bool).tril()
    few = allowed.clone()
    allowed[..., 1:, 0] = False
    few[..., [7, 20], 0] = False
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=allowed).logits
        cut = model.model(input_ids=ids, attention_mask=few).logits
    for keys in ("first", [0], torch.arange(29) == 0, lambda at: at.positions == 0):
        found, (done,) = logits(model, ids, edits.Mask(keys))
        assert rms_ratio(found, hidden) < 1e-5
        assert done.skipped_rows == 3 * 6  # the first query of each head
    assert rms_ratio(logits(model, ids, edits.Knockout([7, 20], "first"))[0], cut) < 1e-5
    assert rms_ratio(hidden, cut) > 1e-3


def test_nothing_to_do_keeps_the_bits_of_the_captured_model():
    model, ids = loaded()
    with torch.no_grad(), lens.traces.capturing(model, statistics=()):
        captured = model.model(input_ids=ids).logits
    for several in ((), (edits.Mask(amount=0), edits.Move("first", amount=0)), (edits.Drop([]),)):
        found, done = logits(model, ids, *several)
        assert torch.equal(found, captured)
        assert all(one.calls == 0 for one in done)
    assert not torch.equal(logits(model, ids, edits.Mask("first", 0.1))[0], captured)


def test_an_edited_model_gives_logits_hidden_states_and_texts():
    model = lens.load("text-lm-3l")
    text = "It was the best of times, it was the worst of"
    ids = model.encode(text)
    mask = edits.Mask("first", layers=[1])
    plain, states = model.logits(text), model.hidden_states(text)
    with torch.no_grad():
        own = model.model(torch.tensor([ids]), output_hidden_states=True)
    assert torch.equal(plain, own.logits[0])
    assert torch.equal(states, torch.stack(own.hidden_states)[:, 0])
    assert [len(one) for one in model.logits([text, ids[:5]])] == [len(ids), 5]
    with lens.edit(model, mask) as (done,):
        edited, changed = model.logits(text), model.hidden_states(text)
        made = model.generate(text, max_new_tokens=6)
        assert (done.steps, done.calls) == (8, 8)
    assert made.shape == (1, len(ids) + 6)
    assert rms_ratio(edited, plain) > 1e-3
    assert rms_ratio(changed[1], states[1]) < 1e-5 < 1e-3 < rms_ratio(changed[2], states[2])
    assert torch.equal(model.logits(text), plain)


def test_a_capture_inside_is_refused_because_it_would_show_the_attention_unedited():
    model, ids = loaded()
    with torch.no_grad(), lens.edit(model, edits.Mask([0])) as (done,):
        with pytest.raises(LensError, match=r"would not be edited: something inside the block"):
            lens.capture(model, [3, 4, 5, 6])
        steps = done.steps
        model.model(input_ids=ids)  # the block goes on as before
        assert (done.steps - steps, done.calls) == (1, 3)


def test_an_effect_of_an_edit_that_leaves_every_row_as_it_is_is_refused():
    """It said that nothing changes, as if the keys were of no use."""
    model, ids = loaded()
    everything = list(range(ids.shape[1]))
    with pytest.raises(
        LensError, match=r"Mask changed nothing in prompt 0: .* edit other or fewer"
    ):
        lens.effect(model, ids, edits.Mask(everything), controls=(), progress=False)
    short = [ids[0].tolist(), ids[0, :4].tolist()]
    with pytest.raises(LensError, match="Mask changed nothing in prompt 1"):
        lens.effect(model, short, edits.Mask([0, 1, 2, 3]), controls=(), progress=False)
    for one in (edits.Mask(everything[1:]), edits.Drop(everything)):
        found = lens.effect(model, ids, one, controls=(), progress=False)
        assert found.values["edit"]["kl"].all()


@pytest.mark.parametrize("one", [edits.Knockout([500], [0]), edits.Force([500], [0])])
def test_an_effect_on_queries_behind_the_prompt_is_refused(one):
    """It ended in an AttributeError."""
    model, ids = loaded()
    with pytest.raises(LensError, match=f"none of the queries is in a prompt of {ids.shape[1]}"):
        lens.effect(model, ids, one, controls=(), progress=False)


def in_a_window():
    """A model whose rows see four keys, and a prompt of 12 tokens."""
    torch.manual_seed(0)
    config = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    root = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    with torch.no_grad():
        for weight in root.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return lens.load(root), list(range(3, 15))


@pytest.mark.parametrize("keys", [{"keys": "first", "to": [11]}, {"keys": [11], "to": [0]}])
def test_keys_that_no_row_sees_together_are_said_to_be_so(keys):
    """It was said that every key that a row sees loses its attention, which is untrue here."""
    model, ids = in_a_window()
    said = (
        "Move changed nothing in prompt 0: in no row that it would change do keys that the row sees"
    )
    with pytest.raises(LensError, match=said):
        lens.effect(model, ids, edits.Move(**keys, heads=["L0H0"]), controls=(), progress=False)


def test_a_control_that_can_change_nothing_is_missing_and_such_a_draw_left_out():
    """Keys 9 go to 10: those of a control at 0 or 1 are never seen beside 10."""
    model, ids = in_a_window()

    def moved(among, prompts=None, draws=8):
        asked = {"controls": "size", "draws": draws, "among": among, "progress": False}
        return lens.effect(
            model, prompts or [ids], edits.Move([9], to=[10], heads=["L0H0"]), **asked
        )

    alone, mixed, never = moved([8]), moved([0, 1, 8]), moved([0, 1])
    for name, values in alone.values["size"].items():
        np.testing.assert_array_equal(values, mixed.values["size"][name])
    assert abs(alone.values["size"]["kl"]).max() > 1e-6
    assert list(never.values) == ["edit"]
    assert never.missing["size"].startswith("Move changed nothing in prompt 0: in no row")
    said = {one.kind: str(one) for one in never.findings()}
    assert "changed nothing in prompt 0" in said["size"]
    # of one prompt alone: the control is left out of all, as its numbers are beside the edit's
    both = moved(lambda at: (at.tokens == 11) | (at.tokens == 3), [ids, [*ids[:8], 9, *ids[9:]]])
    assert list(both.values) == ["edit"]
    assert "in prompt 1" in both.missing["size"]
    assert len(both.table()) == 1


def test_losses_leave_out_what_the_mask_hides():
    model, ids = loaded()
    ids, hidden = ids[:1], torch.ones_like(ids[:1])
    hidden[0, [4, 5, 9]] = 0
    inputs = {"input_ids": ids, "attention_mask": hidden}

    def losses():
        with torch.no_grad():
            after = model.model(**inputs).logits[0, :-1].log_softmax(-1)
        return -after.gather(1, ids[0, 1:, None])[:, 0]

    clean = losses()
    with lens.edit(model, edits.Ablate("L1H3")):
        change = losses() - clean
    kept = hidden[0].bool()
    expected = change[kept[1:] & kept[:-1]].mean()
    found = lens.effect(model, inputs, edits.Ablate("L1H3"), controls=(), progress=False)
    assert found.values["edit"]["delta_loss"][0] == pytest.approx([float(expected)], abs=1e-5)
    assert abs(float(expected - change.mean())) > 1e-3


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: edits.Mask("bos"), "keys by name can only be 'first', got 'bos'"),
        (lambda: edits.Mask([-1]), "keys must be 'first', positions from 0"),
        (lambda: edits.Mask(torch.ones(1, 29) > 0), r"as a mask must be .positions., got \[1, 29\]"),
        (lambda: edits.Mask(amount=1.5), "amount of Mask is a fraction 0..1, got 1.5"),
        (lambda: edits.Drop(amount="all"), "amount must be a number, got 'all'"),  # pyright: ignore[reportArgumentType]
        (lambda: edits.Drop(amount=True), "amount of Drop must be a number, got True"),
        (lambda: edits.Bias([0], math.inf), "amount of Bias .* cannot be .inf"),
        (lambda: edits.LearnedSink(-1), "is exp.its logit., 0 or more, got -1"),
        (lambda: edits.Move([0], "bos"), "to by name can only be 'first'"),
        (lambda: edits.Value([0], "median"), "baseline must be one of 'zero', 'mean'"),
        (lambda: edits.Force([0], [0], split="half"), "split must be one of 'equal', 'own'"),
        (lambda: edits.Knockout(["a"], [0]), "queries must be 'first', positions"),
        (lambda: edits.Mask(heads=["L0H0"], layers=[0]), "give layers or heads, not both"),
        (lambda: edits.Mask(heads="L0H0"), r"must be a list of heads, got 'L0H0'; write \['L0H0'\]"),
        (lambda: edits.Mask(layers=1), r"layers must be a list of numbers, got 1; write \[1\]"),
    ],
)  # fmt: skip
def test_an_edit_that_makes_no_sense_cannot_be_made(make, match):
    with pytest.raises(LensError, match=match):
        make()


@pytest.mark.parametrize(
    ("one", "match"),
    [
        (edits.Mask(layers=[3]), "layers must be numbers 0 to 2, got 3"),
        (edits.Mask(heads=["L0H6"]), "there is no L0H6"),
        (edits.Move([2, 3], [3, 4]), "keys and to must differ; both hold the positions .3."),
        (edits.Mask(lambda at: [0]), "must return a bool tensor .1, 29. or .29., got list"),
        (edits.Force([2], [5]), "layer 0 does not see all of the keys from the query"),
        ("mask", r"lens.edit takes edits such as lens.edits.Mask\('first'\), got str"),
    ],
)  # fmt: skip
def test_an_edit_that_does_not_fit_the_model_is_refused(one, match):
    model, ids = loaded()
    with pytest.raises(LensError, match=match):
        logits(model, ids, one)


def test_keys_in_any_form_are_the_same_edit():
    mask = torch.zeros(9, dtype=torch.bool)
    mask[[2, 5]] = True
    forms = [
        edits.Mask([2, 5]),
        edits.Mask(range(2, 6, 3)),
        edits.Mask(mask),
        edits.Mask(torch.tensor([2, 5])),
        edits.Mask(np.array([2, 5])),
        edits.Mask(np.flatnonzero(mask)),
        edits.Mask(mask.numpy()),
        edits.Mask([*np.array([2, 5])]),
    ]
    assert len({*forms}) == 1
    assert forms[0].keys == (2, 5)


@torch.no_grad()
def test_a_cache_from_outside_has_its_positions_where_a_window_has_cut_it():
    model, ids = loaded("mistral")
    seen = []
    with lens.traces.capturing(model, statistics=()):
        cache = model.model(input_ids=ids, use_cache=True).past_key_values

    def keys(at):
        seen.append(at.positions[0])
        return at.positions == 0

    with lens.edit(model, edits.Mask(keys)):
        model.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    length = ids.shape[1]
    assert all(one.tolist() == list(range(length - 10, length + 1)) for one in seen)


@torch.no_grad()
@pytest.mark.parametrize("one", [edits.Act(threshold=0.01), edits.Pasta([(0, 2)])])
def test_recipes_of_the_prompt_refuse_a_prompt_in_pieces(one):
    model, ids = loaded()
    words = "a prompt in pieces or drafts"
    with lens.edit(model, one):
        cache = model.model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(LensError, match=words):
            model.model(input_ids=ids[:, :3], past_key_values=cache)


# --- what was done, where -------------------------------------------------------------------------


def test_layers_and_heads_select_what_is_edited():
    model, ids = loaded()

    def states(*several):
        with torch.no_grad(), lens.edit(model, *several) as done:
            return model.model(input_ids=ids, output_hidden_states=True).hidden_states, done

    captured, _ = states()
    by_layer, (done,) = states(edits.Move([3], amount=0.9, layers=[1]))
    assert torch.equal(by_layer[1], captured[1])
    assert not torch.equal(by_layer[2], captured[2])
    assert done.calls == 1
    by_head, _ = states(edits.Move([3], amount=0.9, heads=[(1, head) for head in range(6)]))
    one, _ = states(edits.Move([3], amount=0.9, heads=["L1H2"]))
    assert torch.equal(by_head[2], by_layer[2])
    assert not torch.equal(one[2], by_layer[2])


def test_a_function_of_the_layer_sees_positions_and_tokens():
    model, ids = loaded()
    seen = []

    def where(at):
        seen.append((at.layer, at.step, at.positions.tolist(), at.tokens.tolist()))
        return at.positions == 2 + at.layer

    _, (done,) = logits(model, ids, edits.Mask(where))
    assert seen == [(layer, 0, [list(range(29))], ids.tolist()) for layer in range(3)]
    assert done.mass_after == 0


def test_left_padding_does_not_move_positions():
    model, ids = loaded()
    several = (
        edits.Move("first", [2, 5], 0.8),
        edits.Knockout([7], [3], layers=[1]),
        edits.Activation(0, [0, 6], 5, 3.0),
        edits.Value([1], "mean"),
    )
    plain, _ = logits(model, ids, *several)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    real = (torch.arange(33) >= 4).long()[None]
    places = (torch.arange(33) - 4).clamp(min=0)[None]
    with torch.no_grad(), lens.edit(model, *several):
        found = model.model(input_ids=padded, attention_mask=real, position_ids=places).logits
    assert rms_ratio(found[:, 4:], plain) < 1e-5


def test_generation_works_and_the_model_is_put_back():
    model = lens.load("text-lm-3l")
    text = "It was the best of times, it was the worst of"
    before = model.model.config._attn_implementation
    plain = model.generate(text, max_new_tokens=8)
    several = (
        edits.Mask("first", layers=[1, 2]),
        edits.Ablate(["L0H1", "L1.mlp"]),
        edits.Activation(0, 1, 3),
    )
    with lens.edit(model, *several) as (mask, (heads, mlp), place):
        edited = model.generate(text, max_new_tokens=8)
    assert edited.shape == plain.shape
    assert (mask.steps, mask.calls, heads.calls, mlp.calls, place.calls) == (8, 16, 8, 8, 1)
    with pytest.raises(RuntimeError, match="mine"), lens.edit(model, *several):
        raise RuntimeError("mine")
    assert model.model.config._attn_implementation == before
    assert torch.equal(model.generate(text, max_new_tokens=8), plain)


def test_forced_rows_tell_what_they_gave_to_the_keys_before():
    model, ids = loaded()
    force = edits.Force([20, 25], [3, 7], 0.4, heads=["L1H2"])
    nothing = dataclasses.replace(force, amount=0)
    own, _ = logits(model, ids)
    same, (read,) = logits(model, ids, nothing)
    _, (done,) = logits(model, ids, force)
    assert torch.equal(same, own)
    trace = lens.capture(model, ids[0].tolist(), statistics=["block_mass"], block_size=1)
    mass = trace.dataset["block_mass"].to_numpy()[1, 2]
    for one in (read, done):
        ((head, found),) = one.before.items()
        assert str(head) == "L1H2"
        assert found.tolist() == pytest.approx(mass[[20, 25]][:, [3, 7]].sum(1).tolist(), rel=1e-4)


# --- parts of the model ---------------------------------------------------------------------------


def hooked(module, change):
    return module.register_forward_pre_hook(lambda _, args: (change(args[0].clone()),))


def heads_of(module, model, ids):
    """What enters an output projection on ids, [prompts, tokens, heads, dim]."""
    found = []
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    with torch.no_grad():
        model.model(input_ids=ids)
    hook.remove()
    return found[0].unflatten(-1, (model.info.heads, -1))


@pytest.mark.parametrize("baseline", ["zero", "mean", "pooled_mean"])
def test_an_ablated_head_is_its_output_set_before_the_projection(baseline):
    model, ids = loaded()
    other = torch.randint(3, 97, (4, 29), generator=torch.Generator().manual_seed(8))
    projection = model.model.model.layers[1].self_attn.o_proj
    z = heads_of(projection, model, other)
    mean = {
        "zero": 0 * z[:1],
        "mean": z.mean(0, keepdim=True),
        "pooled_mean": z.mean((0, 1), keepdim=True),
    }

    def change(given):
        given = given.unflatten(-1, (6, -1))
        given[:, :, [0, 4]] = mean[baseline].expand_as(given)[:, :, [0, 4]]
        return given.flatten(-2)

    hook = hooked(projection, change)
    with torch.no_grad():
        expected = model.model(input_ids=ids).logits
    hook.remove()
    over = None if baseline == "zero" else [row.tolist() for row in other]
    one = edits.Ablate(["L1H0", "L1H4"], baseline, over)
    found, (done,) = logits(model, ids, one)
    assert rms_ratio(found, expected) < 1e-5
    assert rms_ratio(found, logits(model, ids)[0]) > 1e-3
    assert done.calls == 1
    with torch.no_grad(), lens.edit(model, one):  # and in cached steps
        first = model.model(input_ids=ids[:, :27], use_cache=True)
        rest = model.model(input_ids=ids[:, 27:], past_key_values=first.past_key_values)
    assert rms_ratio(rest.logits, expected[:, 27:]) < 1e-5


def test_an_ablated_sublayer_adds_nothing_or_its_mean():
    model, ids = loaded()
    mlp = model.model.model.layers[1].mlp
    outputs = []
    hook = mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
    own, _ = logits(model, ids)
    hook.remove()
    mean = outputs[0].mean(1, keepdim=True)
    for instead, one in (
        (0 * mean, edits.Ablate("L1.mlp")),
        (mean, edits.Ablate(["L1.mlp"], "pooled_mean", over=ids)),
    ):
        hook = mlp.register_forward_hook(lambda _, __, out, instead=instead: instead.expand_as(out))
        expected, _ = logits(model, ids)
        hook.remove()
        found, (done,) = logits(model, ids, one)
        assert rms_ratio(found, expected) < 1e-5
        assert rms_ratio(found, own) > 1e-4
        assert done.calls == 1


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_a_coordinate_is_set_where_it_is_said_and_in_cached_steps_too(layer):
    model, ids = loaded()
    one = edits.Activation(layer, [3, 27], [5, 8], 11.0)
    layers = model.model.model.layers

    def change(hidden):
        hidden = hidden.clone()
        for position in (3, 27):
            hidden[:, position, [5, 8]] = 11.0
        return hidden

    if layer < 0:
        hook = layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: ((change(args[0]), *args[1:]), kwargs), with_kwargs=True
        )
    else:
        hook = layers[layer].register_forward_hook(lambda _, __, output: change(output))
    expected, _ = logits(model, ids)
    hook.remove()
    found, (done,) = logits(model, ids, one)
    assert rms_ratio(found, expected) < 1e-6
    assert rms_ratio(found, logits(model, ids)[0]) > 1e-3
    assert done.calls == 1
    with torch.no_grad(), lens.edit(model, one) as (done,):
        first = model.model(input_ids=ids[:, :26], use_cache=True)
        rest = model.model(input_ids=ids[:, 26:], past_key_values=first.past_key_values)
    assert rms_ratio(rest.logits, expected[:, 26:]) < 1e-5
    assert done.calls == 2


def test_a_capture_inside_shows_the_model_without_its_parts():
    model, ids = loaded()
    prompt = ids[0].tolist()
    plain = lens.capture(model, prompt).received
    with lens.edit(model, edits.Ablate("L0.mlp"), edits.Activation(1, 4, 3, 40.0)):
        edited = lens.capture(model, prompt).received
    assert np.array_equal(edited[0], plain[0])
    assert not np.allclose(edited[1], plain[1], rtol=1e-3)
    assert not np.allclose(edited[2], plain[2], rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: edits.Ablate([]), "takes out at least one head or sub-layer"),
        (lambda: edits.Ablate(3.5), "what must be a list, got 3.5"),
        (lambda: edits.Ablate("L0H0", "median"), "baseline must be one of 'zero', 'mean'"),
        (lambda: edits.Ablate("L0H0", over=[[1, 2]]), "over belongs to a mean"),
        (lambda: edits.Ablate("L0.mlp", "mean"), "use 'pooled_mean' for L0.mlp"),
        (lambda: edits.Activation(0.5, 0, 0), "layer of Activation must be a whole number, got 0.5"),
        (lambda: edits.Activation(0, [], 3), "position of Activation must be one or more numbers"),
        (lambda: edits.Activation(0, 1, 3, math.nan), "value of Activation must be a number"),
        (lambda: edits.Var([1], sinks=[0], tau=3.0), "give sinks, or dims and tau"),
        (lambda: edits.Var([1], rho=2.0), "rho of VAR is a fraction 0..1"),
    ],
)  # fmt: skip
def test_parts_and_recipes_that_make_no_sense_cannot_be_made(make, match):
    with pytest.raises(LensError, match=match):
        make()


@pytest.mark.parametrize(
    ("one", "match"),
    [
        (edits.Ablate("L0H0", "mean"), "over: over=texts; 'zero' needs none, and lens.effect takes its own"),
        (edits.Ablate("L0H0", "mean", [[3, 4, 5]]), "the mean over one prompt is that prompt"),
        (edits.Ablate("L0H0", "mean", [[3, 4], [3, 5]]), "position 28 has no mean: fewer than 2 of"),
        (edits.Ablate("L3.mlp"), "has no sub-layer L3.mlp; it has L0.attention, L0.mlp"),
        (edits.Ablate("L3H0"), "there is no L3H0"),
        (edits.Activation(3, 0, 0), "layer must be -1 to 2, got 3"),
        (edits.Activation(0, 0, 48), "dim must be 0 to 47, got 48"),
        (edits.Var([1], dims=[48]), "dims must be some of 0 to 47"),
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_the_model_has_not_got_are_refused(one, match):
    model, ids = loaded()
    with pytest.raises(LensError, match=match):
        logits(model, ids, one)


# --- frozen patterns ------------------------------------------------------------------------------


class Holding:
    """Eager attention on whole probabilities; the chosen heads use those of an earlier run."""

    def __init__(self, heads):
        self.heads, self.patterns, self.held = heads, [], None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        share = query.shape[1] // key.shape[1]
        k, v = (x.double().repeat_interleave(share, 1) for x in (key, value))
        p = (query.double() @ k.transpose(-1, -2) * scaling + attention_mask.double()).softmax(-1)
        if self.held is None:
            self.patterns.append(p)
        else:
            chosen = self.heads[module.layer_idx][:, None, None]
            p = torch.where(chosen, self.held[module.layer_idx], p)
        return (p @ v).to(query.dtype).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("heads", [None, ["L0H1", "L1H0", "L1H5", "L2H2"]], ids=["all", "some"])
def test_a_frozen_pattern_is_that_of_the_other_prompt(heads):
    model, ids = loaded()
    other = ids.roll(7, 1)
    chosen = selected_heads(model, None, heads)
    twin = Holding(chosen)
    AttentionInterface.register("holding_twin", twin)
    AttentionMaskInterface.register("holding_twin", eager_mask)
    with switched(model.model, "holding_twin"), torch.no_grad():
        model.model(input_ids=other)
        twin.held = twin.patterns
        expected = model.model(input_ids=ids).logits
        for p in twin.held:
            p[..., 1:, 0] = 0
            p /= p.sum(-1, keepdim=True)
        masked = model.model(input_ids=ids).logits
    found, (done,) = logits(model, ids, edits.Freeze(other[0], heads=heads))
    assert rms_ratio(found, expected) < 1e-5
    both = (edits.Freeze(other[0], heads=heads), edits.Mask("first", heads=heads))
    assert rms_ratio(logits(model, ids, *both)[0], masked) < 1e-5
    assert rms_ratio(masked, expected) > 1e-3
    assert rms_ratio(found, logits(model, ids)[0]) > 1e-3
    assert done.calls == 3
    with torch.no_grad(), lens.edit(model, edits.Freeze(other[0], heads=heads)):
        first = model.model(input_ids=ids[:, :26], use_cache=True)
        rest = model.model(input_ids=ids[:, 26:], past_key_values=first.past_key_values)
    assert rms_ratio(rest.logits, expected[:, 26:]) < 1e-5


def test_the_own_pattern_changes_nothing_until_another_edit_changes_what_is_moved():
    model, ids = loaded()
    plain = logits(model, ids)[0]
    hold, out = edits.Freeze(ids[0]), edits.Ablate("L0.mlp")
    assert rms_ratio(logits(model, ids, hold)[0], plain) < 1e-6
    held, free = logits(model, ids, hold, out)[0], logits(model, ids, out)[0]
    assert rms_ratio(held, free) > 1e-3
    assert rms_ratio(held, plain) > 1e-3
    # the edit of a held pattern: in layer 0 the pattern is the run's own, so the mask is as it is
    mask = edits.Mask("first", layers=[0])
    whole = logits(model, ids, edits.Freeze(ids[0], layers=[0]), mask)[0]
    assert rms_ratio(whole, logits(model, ids, mask)[0]) < 1e-5
    both = torch.cat([ids, ids.roll(3, 1)])
    two, _ = logits(model, both, edits.Freeze(list(both)))
    assert rms_ratio(two, logits(model, both)[0]) < 1e-6


def test_effect_holds_the_clean_pass_of_each_prompt():
    model, ids = loaded()
    prompts = [ids[0], ids[0, :17]]
    nothing = lens.effect(model, prompts, edits.Freeze(), controls=())
    assert np.abs(nothing.values["edit"]["delta_loss"]).max() < 1e-6
    found = lens.effect(model, prompts, [edits.Freeze(), edits.Ablate("L0.mlp")])
    assert list(found.values) == ["edit", "size"]
    for number, prompt in enumerate(prompts):
        held, _ = logits(model, prompt[None], edits.Freeze(prompt), edits.Ablate("L0.mlp"))
        loss = [
            torch.nn.functional.cross_entropy(one[0, :-1], prompt[1:])
            for one in (held, logits(model, prompt[None])[0])
        ]
        change = float(loss[0] - loss[1])
        assert found.values["edit"]["delta_loss"][0, number] == pytest.approx(change, abs=1e-5)


@pytest.mark.parametrize(
    ("several", "match"),
    [
        ([edits.Freeze()], "Freeze needs the prompts whose pattern is held"),
        (
            [edits.Freeze([[3, 4], [3, 4, 5]])],
            r"prompts of Freeze must have one length, got \[2, 3\]",
        ),
        ([edits.Freeze([3, 4, 5])], "holds the pattern of 3 tokens and the model runs 29"),
        ([edits.Freeze([[3] * 29] * 3)], "holds 3 prompts and the model runs 1"),
        ([edits.Mask(), edits.Freeze([3] * 29)], "Freeze acts first, and Mask comes before it"),
    ],
    ids=str,
)
def test_patterns_that_cannot_be_held_are_refused(several, match):
    model, ids = loaded()
    with pytest.raises(LensError, match=match):
        logits(model, ids, *several)


def test_a_pattern_that_looks_ahead_is_held_at_its_own_length_alone():
    model = lens.load(build("bert"))
    ids = torch.arange(3, 14)[None]
    with lens.edit(model, edits.Freeze(ids[0].tolist())), torch.no_grad():
        model.model(input_ids=ids)
        with pytest.raises(LensError, match="give prompts as long as what is run"):
            model.model(input_ids=ids[:, :7])
