"""A `TransformerBridge` of TransformerLens gives the trace of the bare model, and the same weights load there."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import lens
from lens.common.errors import LensError
from lens.models.catalogue import KNOWN
from lens.models.words import SymbolTokenizer
from lens.passes import bridge as bridges
from tests.benchmarks import models_table
from tests.lens import naive
from tests.lens.architectures import build, save_tokenizer

pytestmark = pytest.mark.slow  # importing TransformerLens alone takes five seconds

NATIVE = {
    "n_layers": 2,
    "d_model": 64,
    "n_heads": 4,
    "d_head": 16,
    "n_ctx": 128,
    "d_vocab": 65,
    "attn_only": True,
    "act_fn": "relu",
    "normalization_type": "LN",
    "eps": 1e-5,
}


@pytest.fixture(scope="module")
def transformer_bridge():
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge


@pytest.fixture
def boot(transformer_bridge, tmp_path, monkeypatch):
    """Bare model -> bridge over a copy of it; boot_transformers wants a folder with a tokenizer."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def booted(model):
        model.save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        return transformer_bridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model))

    return booted


def _native(transformer_bridge):
    import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)

    bridge = transformer_bridge.boot_native(dict(NATIVE), tokenizer=None)
    weights = load_file(KNOWN["induction-2l"].folder / "model.safetensors")
    bridge.load_state_dict(weights)
    return bridge.eval()


def _assert_equal_traces(found, expected):
    assert set(found.dataset.data_vars) == set(expected.dataset.data_vars)
    for variable in expected.dataset.data_vars:
        values = expected.dataset[variable].values
        assert naive.rms_ratio(found.dataset[variable].values, values) < 1e-5, variable
    for name in ("windows", "softcap", "scale", "learned_sinks", "kv_heads", "causal"):
        assert found.attrs[name] == expected.attrs[name]


def test_the_weights_of_a_bridge_count_once(boot):
    model = models_table.make("gpt2", False)  # its q, k and v are one matrix
    assert lens.load(boot(model)).info.parameters == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_a_bridge_with_a_bias_by_distance_gives_the_trace_of_the_bare_model(kind):
    model = models_table.make(kind, False)
    bridge = lens.load(models_table.bridged(model))
    assert bridge.check < 1e-5
    ids = torch.randint(3, 97, (19,), generator=torch.Generator().manual_seed(5)).tolist()
    _assert_equal_traces(lens.capture(bridge, ids), lens.capture(lens.load(model), ids))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3", "gpt_oss"])
def test_a_bridge_gives_the_trace_of_the_bare_model(boot, name):
    model = build(name)
    bridge = lens.load(boot(model))
    assert bridge.is_bridge
    assert bridge.check < 1e-5
    assert bridge.info.class_name == f"TransformerBridge of {type(model).__name__}"
    ids = torch.randint(3, 97, (41,), generator=torch.Generator().manual_seed(5)).tolist()
    expected = lens.capture(lens.load(model), ids, keep_qk=True)
    _assert_equal_traces(lens.capture(bridge, ids, keep_qk=True), expected)


@torch.no_grad()
def test_the_bridge_is_itself_again_afterwards_and_its_hooks_fire_inside(boot):
    bridge = boot(build("gpt2"))
    ids = torch.arange(3, 40)[None]
    before = bridge(ids)
    state = [sorted(vars(module)) for module in bridge.modules()]
    seen = []
    hook = bridge.blocks[1].attn.hook_z
    hook.add_hook(lambda z, hook: seen.append(tuple(z.shape)))
    with lens.traces.capturing(lens.load(bridge)):
        seen.clear()
        captured = bridge(ids)
    assert seen == [(1, 37, 6, 8)]
    hook.remove_hooks()
    assert naive.rms_ratio(captured, before) < 1e-5
    assert [sorted(vars(module)) for module in bridge.modules()] == state
    assert torch.equal(bridge(ids), before)


def test_a_bridge_with_folded_weights_has_the_same_attention(boot):
    bridge = boot(build("gpt2"))
    bridge.enable_compatibility_mode()
    ids = list(range(3, 40))
    expected = lens.capture(lens.load(build("gpt2")), ids)
    found = lens.capture(lens.load(bridge), ids)
    # Folding LayerNorm and centring change q and k by a rotation at most: P is the same.
    ratio = naive.rms_ratio(found.entropy.values, expected.entropy.values)
    assert ratio < 1e-4


def test_induction_2l_loads_natively_with_the_same_logits_and_trace(transformer_bridge):
    bridge = _native(transformer_bridge)
    ours = lens.load("induction-2l")
    ids = lens.tasks.copied(ours, 25)
    with torch.no_grad():
        expected = ours.model(torch.tensor([ids])).logits
        assert naive.rms_ratio(bridge(torch.tensor([ids])), expected) < 1e-4
    model = lens.load(bridge, tokenizer=SymbolTokenizer())
    found, expected = lens.capture(model, ids), lens.capture(ours, ids)
    for variable in expected.dataset.data_vars:
        values = expected.dataset[variable].values
        assert naive.rms_ratio(found.dataset[variable].values, values) < 1e-4, variable
    with lens.traces.capturing(model), pytest.raises(LensError, match="takes no attention_mask"):
        bridge.original_model.layers[0].attn.original_component(
            torch.zeros(1, 3, 64), attention_mask=torch.ones(1, 3)
        )


def test_a_bridge_has_no_loss_here(transformer_bridge):
    model = lens.load(_native(transformer_bridge), tokenizer=SymbolTokenizer())
    with pytest.raises(LensError, match="has no next-token loss: it is a TransformerBridge"):
        lens.tasks.loss(model, [64, 1, 2])


def test_bridges_that_capture_does_not_know_are_refused(transformer_bridge):
    class AttentionBridge(torch.nn.Module):
        original_component = torch.nn.Identity()

    class Exotic(AttentionBridge):
        pass

    class Bridge(torch.nn.Module):
        original_model = torch.nn.Identity()

    strange = Bridge()
    strange.attention = Exotic()
    for bridge, expected in (
        (Bridge(), "the bridge of Identity has no AttentionBridge"),
        (strange, "capture does not know the bridge Exotic over Identity"),
    ):
        with pytest.raises(LensError, match=expected), bridges.replaced_attention(bridge):
            pytest.fail("the block must not be entered")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("gpt2", {"position_ids": torch.arange(13).flip(0)[None]}),
        ("gpt2", {"token_type_ids": torch.arange(3, 16)[None]}),
        ("llama", {"position_ids": torch.arange(13)[None] * 2}),
        ("llama", {"attention_mask": torch.tensor([[1] * 4 + [0, 0] + [1] * 7])}),
    ],
)
def test_what_a_mapping_holds_reaches_a_bridge_or_is_refused(boot, name, given):
    model = build(name)
    bridge = lens.load(boot(model))
    ids = torch.randint(3, 97, (1, 13), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, **given}
    expected = lens.capture(lens.load(model), inputs, progress=False)
    without = lens.capture(lens.load(model), ids[0], progress=False)
    assert naive.rms_ratio(without.received.values, expected.received.values) > 1e-3
    _assert_equal_traces(lens.capture(bridge, inputs, progress=False), expected)
    with pytest.raises(LensError, match="takes no labels"):
        lens.capture(bridge, {**inputs, "labels": ids}, progress=False)
