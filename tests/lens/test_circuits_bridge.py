"""Circuits of a `TransformerBridge` are those of the model that it wraps, folded and centred weights included."""

import copy

import pytest
import torch

import lens
from lens.circuits import evaluate, patch, score_edges
from lens.circuits.discovery import acdc, learn_masks
from lens.circuits.graph.nodes import find_nodes
from lens.common.errors import LensError
from lens.models.bare import bare
from lens.models.words import SymbolTokenizer
from lens.tasks import Task
from tests.lens.architectures import build, save_tokenizer
from tests.lens.circuit_models import error
from tests.tiers import first

pytestmark = pytest.mark.slow  # importing TransformerLens alone takes five seconds


@pytest.fixture(scope="module")
def transformer_bridge():
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge


def disturbed(name):
    """A small model whose norms have weights and biases of their own."""
    model = build(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def pair(request, transformer_bridge, tmp_path, monkeypatch):
    """The bare model and a bridge over a copy of it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = disturbed(request.param)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    bridge = transformer_bridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model))
    return lens.load(model), bridge


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(3, 90, shape, generator=generator)

    last = torch.full((3, 1), 6)
    return Task(
        "drawn", draw(3, 7), last, draw(3, 1), "logit_difference", draw(3, 7), wrong=draw(3, 1)
    )


@pytest.mark.parametrize("pair", first(["gpt2", "llama", "qwen3"], "gpt2", "qwen3"), indirect=True)
def test_scores_and_evaluation_are_those_of_the_bare_model(pair, task):
    own, bridge = pair
    model = lens.load(bridge)
    before = bridge(task.clean)
    for method in ("eap", "eap-ig", "atp*"):
        expected = score_edges(own, task, method=method)
        found = score_edges(model, task, method=method)
        assert error(found.values, expected.values) < 1e-6, method
    assert found.graph == expected.graph
    expected, found = (evaluate(it, task, found, draws=2, seed=3) for it in (own, model))
    assert error(found.signed.metric, expected.signed.metric) < 1e-6
    assert (found.cpr, found.cmd) == pytest.approx((expected.cpr, expected.cmd), rel=1e-6)
    assert torch.equal(bridge(task.clean), before)  # nothing is left behind
    assert model.is_bridge


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_every_way_to_find_a_circuit_takes_a_bridge(pair, task):
    own, bridge = pair
    model = lens.load(bridge)
    ways = (
        lambda it: patch(it, task, progress=False).patched,
        lambda it: patch(it, task, receivers=["logits"], progress=False).patched,
        lambda it: acdc(it, task, 0.05, progress=False).kept,
        lambda it: learn_masks(it, task, penalty=1, steps=2, progress=False).log_alpha,
    )
    for way in ways:
        assert error(way(model), way(own)) < 1e-5


@pytest.mark.parametrize(
    "pair",
    first(["gpt2", "llama", "qwen3"], "qwen3"),
    indirect=True,
)
def test_folded_norms_and_centred_weights_change_no_score(pair, task):
    own, bridge = pair
    bridge.enable_compatibility_mode()
    model = lens.load(bridge)
    logits, other = own.model(task.clean).logits.detach(), bridge(task.clean).detach()
    assert error(other, logits) > 0.01  # centred: it is another model
    expected = score_edges(own, task, method="eap-ig")
    assert error(score_edges(model, task, method="eap-ig").values, expected.values) < 1e-5
    exact = score_edges(own, task, method="exact").values
    assert error(score_edges(model, task, method="exact").values, exact) < 1e-4


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_the_tensors_are_those_of_the_bridge(pair, task):
    _, bridge = pair
    nodes = find_nodes(lens.load(bridge))
    assert not nodes.model.is_bridge
    wrapped = bridge.original_model.transformer.h[1].mlp.c_fc.weight
    assert nodes.layers[1].block.mlp
    assert (
        nodes.layers[1].block.mlp[0].get_parameter("c_fc.weight").data_ptr() == wrapped.data_ptr()
    )


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_a_bridge_with_hooks_is_refused(pair, task):
    _, bridge = pair
    model = lens.load(bridge)
    hook = bridge.blocks[0].hook_mlp_out
    hook.add_hook(lambda value, hook: value * 0)
    with pytest.raises(LensError, match=r"logits differ from those of the model that it wraps"):
        score_edges(model, task)
    hook.remove_hooks()
    assert score_edges(model, task).n == 3


def test_a_native_bridge_is_refused(transformer_bridge):
    import transformer_lens.model_bridge.sources.native  # noqa: F401  (adds boot_native)

    sizes = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "n_ctx": 16, "d_vocab": 65}
    bridge = transformer_bridge.boot_native({**sizes, "act_fn": "relu"}, tokenizer=None)
    model = lens.load(bridge.eval(), tokenizer=SymbolTokenizer())
    with pytest.raises(LensError, match="which is no transformers model; load its weights as one"):
        find_nodes(model)


def test_a_model_without_a_bridge_is_itself():
    model = lens.load("induction-2l")
    assert bare(model) is model
