"""Captured attention is the model's own, for every shape of model: outputs, statistics, windows, sinks."""

import pytest
import torch

from lens.passes.interface import IMPLEMENTATION, switched
from lens.passes.loading import load
from lens.traces.recorder import capturing
from tests.lens import naive
from tests.lens.architectures import BUILDERS, VOCAB, build

TOKENS = 37
BLOCK = 16
BIDIRECTIONAL = ("bert", "modernbert", "vit", "t5_encoder")

# Per layer: window (its query included) and whether there are learned sinks.
WINDOWS = {
    "mistral": [11, 11, 11],
    "gemma2": [11, None, 11],
    "gemma3": [None, 11, 11],
    "gpt_oss": [11, None, 11],
    "modernbert": [None, 8, 8],
}


def _inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    if name == "vit":
        return {"pixel_values": torch.randn(1, 1, 10, 10, generator=generator)}
    return {"input_ids": torch.randint(3, VOCAB // 4, (1, TOKENS), generator=generator)}


@pytest.fixture(params=BUILDERS)
def name(request):
    return request.param


@torch.no_grad()
def test_outputs_and_statistics_equal_eager(name):
    model = build(name)
    loaded = load(model)
    inputs = _inputs(name)
    with switched(model, "eager"):
        eager = model(**inputs, output_attentions=True)
    with capturing(loaded, block_size=BLOCK) as recorder:
        captured = model(**inputs)
    assert naive.rms_ratio(captured[0], eager[0]) < 1e-5
    assert len(recorder.records) == len(eager.attentions) == 3
    ids = inputs.get("input_ids")
    for record, weights in zip(recorder.records, eager.attentions, strict=True):
        causal = name not in BIDIRECTIONAL
        assert record.causal == causal
        expected = naive.statistics(weights[0], None if ids is None else ids[0], BLOCK, causal)
        for variable, values in expected.items():
            found = record.variables[variable][0]
            assert naive.rms_ratio(found, values) < 1e-5, (name, record.layer, variable)
        largest = (record.variables["max_logit"] - record.variables["lse"])[0].exp()
        assert naive.rms_ratio(largest, weights[0].amax(-1)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_and_learned_sinks_are_honoured_per_layer(name):
    loaded = load(build(name))
    with capturing(loaded, statistics=["diagonal", "received"]) as recorder:
        loaded.model(**_inputs(name))
    assert [record.window for record in recorder.records] == WINDOWS[name]
    for record in recorder.records:
        mass = record.variables["diagonal"][0]
        first = 0 if record.causal else TOKENS - 1  # index of distance 0
        if record.window is not None:
            assert mass[:, first + record.window :].abs().max() == 0
            assert mass[:, first + record.window - 1].min() > 0
        else:
            assert mass[:, -1].min() > 0
        row_sum = mass.sum(-1) / TOKENS
        if name == "gpt_oss":
            assert (row_sum < 0.99).all(), "the learned sink takes its share of every row"
        else:
            assert torch.allclose(row_sum, torch.ones_like(row_sum), atol=1e-5)


@torch.no_grad()
def test_softcap_is_honoured():
    model = build("gemma2")
    loaded = load(model)
    with capturing(loaded, statistics=["max_logit"]) as recorder:
        model(**_inputs("gemma2"))
    assert all(record.softcap == 0.7 for record in recorder.records)
    assert max(record.variables["max_logit"].max() for record in recorder.records) <= 0.7


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert"])
def test_a_padded_batch_equals_eager_and_the_prompts_one_by_one(name, side):
    model = build(name)
    loaded = load(model)
    ids = _inputs(name)["input_ids"][0]
    lengths = [TOKENS, 23]
    batch = torch.zeros(2, TOKENS, dtype=torch.long)
    real = torch.zeros(2, TOKENS, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(TOKENS - length, TOKENS)
        batch[row, where], real[row, where] = ids[:length], 1
    inputs = {"input_ids": batch, "attention_mask": real}
    if name != "bert" or side == "left":
        inputs["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    with switched(model, "eager"):
        eager = model(**inputs)[0]
    with capturing(loaded) as padded:
        captured = model(**inputs)[0]
    assert naive.rms_ratio(captured[real.bool()], eager[real.bool()]) < 1e-5
    with capturing(loaded) as alone:
        model(ids[None, : lengths[1]])
    where = slice(0, lengths[1]) if side == "right" else slice(TOKENS - lengths[1], TOKENS)
    for record, single in zip(padded.records, alone.records, strict=True):
        for variable in ("lse", "entropy", "first_mass_or_prefix", "received"):
            if variable == "first_mass_or_prefix":
                variable = "prefix_mass"
            found = record.variables[variable][1][..., where]
            assert naive.rms_ratio(found, single.variables[variable][0]) < 1e-5, variable
        outside = record.variables["received"][1].clone()
        outside[:, where] = 0
        assert outside.abs().max() == 0, "padding receives nothing and its rows give nothing"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_generation_is_captured_step_by_step(name):
    model = build(name)
    loaded = load(model)
    ids = _inputs(name)["input_ids"][:, :19]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with capturing(loaded) as recorder:
        found = model.generate(ids, **options)
    assert found.tolist() == expected.tolist()
    assert recorder.steps == 5
    with switched(model, "eager"):
        weights = model(found[:, :-1], output_attentions=True).attentions
    for step in range(1, 5):
        for record in recorder.layers(step):
            row = weights[record.layer][0, :, 18 + step, : 19 + step]
            hidden = 19 + step - record.keys  # keys that a sliding cache has dropped
            assert (record.queries, record.query_start, record.key_start) == (1, 18 + step, hidden)
            entropy = naive._entropy(row.double().numpy())
            assert naive.rms_ratio(record.variables["entropy"][0, :, 0], entropy) < 1e-5
            received = record.variables["received"][0]
            assert naive.rms_ratio(received, row[:, hidden:]) < 1e-5
            same = found[0, hidden : 19 + step] == found[0, 18 + step]
            mass = record.variables["match_mass"][0, :, 0, 2]
            assert naive.rms_ratio(mass, (row[:, hidden:] * same).sum(-1)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "vit"])
def test_everything_is_put_back_even_after_an_exception(name):
    model = build(name)
    loaded = load(model)
    before = _state(model)

    def fail_inside():
        with capturing(loaded):
            model(**_inputs(name))
            assert model.config._attn_implementation == IMPLEMENTATION
            assert _state(model) != before
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_inside()
    assert _state(model) == before


def test_gradients_flow_through_a_capture_as_through_eager():
    model = build("llama")
    loaded = load(model)
    inputs = _inputs("llama")
    with switched(model, "eager"):
        model(**inputs).logits.square().mean().backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    with capturing(loaded):
        model(**inputs).logits.square().mean().backward()
    found = model.model.layers[0].self_attn.q_proj.weight.grad
    assert naive.rms_ratio(found, expected) < 1e-4


def _state(model) -> list:
    modules = list(model.modules())
    return [
        [module.config._attn_implementation for module in modules if hasattr(module, "config")],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [sorted(vars(module)) for module in modules],
    ]
