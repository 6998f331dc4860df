"""The table of architectures: each row is proved by replay, and a wrong one is caught."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lens
from lens.common.errors import LensError
from lens.edits import Ablate
from lens.models import layout as finding
from lens.models.architectures import ARCHITECTURES
from lens.models.layout import blocks, layout
from lens.passes import replay
from lens.passes import sublayers as proving
from lens.passes.inputs import read_prompts
from lens.passes.replay import proved, replay_error
from lens.passes.residual import changed, layer_inputs, stream
from lens.passes.sublayers import sublayers
from tests.lens.architectures import build
from tests.lens.layouts import KINDS, layout_model


@pytest.fixture(scope="module")
def models():
    made: dict = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = lens.load(layout_model(kind))
        return made[kind]

    return get


def test_every_row_has_a_model():
    assert set(KINDS) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_gives_the_models_own_logits(models, kind):
    found = proved(models(kind))
    assert replay_error(found) < 5e-6
    assert len(found.blocks) == models(kind).info.layers
    for block in found.blocks:
        assert [len(weight) for weight, _ in block.weights] == [
            models(kind).info.heads,
            models(kind).info.kv_heads,
            models(kind).info.kv_heads,
        ]


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("llama", {"before_mlp": "input_layernorm", "before_attention": "post_attention_layernorm"}),
        ("llama", {"norm": "rms+1"}),
        ("llama", {"norm": "layer"}),
        ("llama", {"final_norm": "layers.0.input_layernorm"}),
        ("llama", {"parallel": True}),
        ("gpt2", {"before_mlp": "ln_1", "before_attention": "ln_2"}),
        ("gpt2", {"joint": "heads"}),
        ("gpt2", {"positions": None}),
        ("gpt2", {"norm": "rms"}),
        ("gpt_neox", {"parallel": False}),
        ("gpt_neox", {"joint": "parts"}),
        ("opt", {"qkv": ("k_proj", "q_proj", "v_proj")}),
        ("granite", {"residual_scale": None}),
        ("granite", {"embedding_scale": None}),
        ("granite", {"logit_divisor": None}),
        ("cohere", {"logit_scale": None}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"after_attention": None}),
        ("gemma2", {"after_mlp": "post_attention_layernorm"}),
        ("olmo2", {"before_mlp": "post_attention_layernorm"}),
        ("bert", {"token_types": None}),
        ("bert", {"closing": "attention.output.LayerNorm"}),
        ("opt", {"mlp": ("fc1", "fc2")}),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_caught(monkeypatch, models, kind, wrong):
    table = {**ARCHITECTURES, kind: replace(ARCHITECTURES[kind], **wrong)}
    monkeypatch.setattr(finding, "ARCHITECTURES", table)
    monkeypatch.setattr(replay, "_proved", {})
    with pytest.raises(
        LensError, match=r"does not compute what its parts say|before the norm that"
    ):
        proved(models(kind))


def test_the_replay_runs_once_and_again_after_a_change(monkeypatch):
    model = lens.load(layout_model("llama"))
    runs = []
    monkeypatch.setattr(replay, "replay_error", lambda found: runs.append(1) or replay_error(found))
    proved(model)
    proved(model)
    assert len(runs) == 1
    handle = model.model.model.layers[1].register_forward_hook(lambda *_: None)
    proved(model)
    assert len(runs) == 2
    handle.remove()


@pytest.mark.parametrize(
    "path",
    ["model.layers.1", "model.layers.0.self_attn.o_proj", "model.layers.2.mlp", "lm_head",
     "model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.layers.1.input_layernorm"],
)  # fmt: skip
def test_hooks_that_change_the_run_are_refused_and_named(path):
    model = lens.load(layout_model("llama"))
    module = model.model.get_submodule(path)
    handle = module.register_forward_hook(
        lambda _, __, output: output + 1 if isinstance(output, torch.Tensor) else output
    )
    if path == "model.embed_tokens":  # one more word of the embedding is one more of the replay's
        assert replay_error(proved(model)) < 5e-6
        return
    with pytest.raises(LensError, match=f"It has hooks on {path}: remove them first"):
        proved(model)
    handle.remove()
    assert replay_error(proved(model)) < 5e-6


class _Adapter(nn.Module):
    """As peft makes them: the weight of the base, and more in the forward pass."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    in_features = property(lambda self: self.base_layer.in_features)
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + (x @ self.a.T) @ self.b.T


def test_what_a_projection_computes_is_its_weight_whatever_holds_it():
    root = layout_model("llama")
    attention = root.model.layers[1].self_attn
    base, attention.v_proj = attention.v_proj, _Adapter(attention.v_proj)
    model = lens.load(root)
    adapted = proved(model)
    assert replay_error(adapted) < 5e-6
    with torch.no_grad():
        base.weight += attention.v_proj.b @ attention.v_proj.a
    attention.v_proj = base
    merged = proved(model)
    assert replay_error(merged) < 5e-6
    values = [found.blocks[1].weights[2][0] for found in (adapted, merged)]
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


class Linear8bit(nn.Linear):
    """Weights of eight bits, and a forward pass of its own, which may round what it reads too."""

    rounds = False

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.scale = base.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().char(), requires_grad=False)

    def forward(self, x):
        return ((x * 16).round() / 16 if self.rounds else x) @ (self.weight * self.scale).T


class _Split(torch.Tensor):
    """A tensor that is more than its numbers, such as a DTensor."""


def test_a_class_of_another_type_than_its_configuration_is_captured_and_its_blocks_refused():
    root = layout_model("llama")
    root.config.model_type = "gpt2"
    model = lens.load(root)
    assert lens.capture(model, [[1, 2, 3]])[0].layers
    with pytest.raises(LensError, match="LlamaModel is not built as models of type 'gpt2' are"):
        blocks(model)


def test_weights_that_cannot_be_read_are_refused():
    root = layout_model("llama", attention_bias=False)
    attention = root.model.layers[2].self_attn
    base, attention.o_proj = attention.o_proj, Linear8bit(attention.o_proj)
    model = lens.load(root)
    assert replay_error(proved(model)) < 5e-6
    attention.o_proj.rounds = True
    with pytest.raises(
        LensError, match=r"a Linear8bit does not compute x W \+ b.*load the model in"
    ):
        proved(model)
    attention.o_proj = base
    assert replay_error(proved(model)) < 5e-6
    base.weight = nn.Parameter(base.weight.detach().as_subclass(_Split))
    with pytest.raises(LensError, match="weights of a Linear give a _Split: split over"):
        proved(model)
    attention.o_proj = nn.Linear(24, 24, device="meta")
    with pytest.raises(LensError, match="weights of a Linear are not in memory"):
        proved(model)


def test_weights_that_are_no_numbers_are_refused():
    model = lens.load(layout_model("gpt2"))
    with torch.no_grad():
        model.model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(LensError, match="gives values that are not numbers"):
        proved(model)


def test_what_is_not_in_the_table_is_refused_with_what_is():
    with pytest.raises(
        LensError, match="where 'modernbert' keeps its parts is not known here; known: llama"
    ):
        layout(lens.load(build("modernbert")))
    with pytest.raises(LensError, match="OPT with norms after its sums"):
        layout(lens.load(layout_model("opt", do_layer_norm_before=False)))


_SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}


@pytest.mark.parametrize(
    ("kind", "sizes", "named"),
    [
        ("Mpt", {"d_model": 24, "n_layers": 2, "n_heads": 3}, "MptMLP"),
        ("Roberta", _SMALL, "RobertaAttention"),
        ("Esm", {**_SMALL, "pad_token_id": 1, "mask_token_id": 2}, "EsmAttention"),
        ("XLMRobertaXL", _SMALL, "XLMRobertaXLAttention"),
        ("RobertaPreLayerNorm", _SMALL, "RobertaPreLayerNormAttention"),
        ("MPNet", _SMALL, "MPNetAttention"),
    ],
)
def test_a_child_that_adds_the_stream_itself_is_not_taken_out(kind, sizes, named):
    """At 0 it would take the whole stream with it."""
    model = lens.load(
        getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(vocab_size=61, **sizes)
        ).eval()
    )
    said = f"{named} in layer 0 of {kind}Model gives the residual stream"
    with pytest.raises(LensError, match=said), lens.edit(model, Ablate(["L0.attention"], "zero")):
        pass


def test_children_that_add_nothing_else_are_proved_once(monkeypatch):
    model = lens.load(build("modernbert"))
    sublayers(model)
    monkeypatch.setattr(proving, "run", None)
    assert len(sublayers(model)) == 3


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "llama"])
def test_a_sublayer_at_0_leaves_the_stream_as_it_was(models, kind):
    """Attention of layer 0 alone, and both: the block gives what it was given."""
    model = models(kind)
    seen: dict = {}
    block = blocks(model)[0]
    handle = block.register_forward_hook(
        lambda _, args, output: seen.update(
            read=args[0], gave=output if torch.is_tensor(output) else output[0]
        )
    )
    with torch.no_grad(), lens.edit(model, lens.edits.Ablate(["L0.attention", "L0.mlp"], "zero")):
        model.model(torch.arange(3, 14)[None])
    handle.remove()
    torch.testing.assert_close(seen["gave"], seen["read"])


def test_layers_and_sublayers_of_models_outside_the_table():
    model = lens.load(build("modernbert"))
    assert [type(block).__name__ for block in blocks(model)] == ["ModernBertEncoderLayer"] * 3
    assert [type(part.mlp).__name__ for part in sublayers(model)] == ["ModernBertMLP"] * 3


def test_shared_layers_are_read_one_by_one_and_not_left_out():
    """ALBERT runs one module several times; what enters each run is seen once, in order."""
    model = lens.load(layout_model("albert"))
    seen = []
    with torch.no_grad(), layer_inputs(model, lambda layer, hidden: seen.append((layer, hidden))):
        model.model(torch.tensor([[3, 5, 9]]))
    assert [layer for layer, _ in seen] == [0, 1, 2, 3]
    found = stream(model, read_prompts(model, torch.tensor([3, 5, 9]))[0][0])
    for (_, hidden), state in zip(seen, found, strict=False):
        assert torch.equal(hidden[0], state)
    assert not torch.equal(found[1], found[2])
    with changed(model, 1, torch.zeros_like):
        assert not stream(model, read_prompts(model, torch.tensor([3, 5, 9]))[0][0])[2].any()
    with pytest.raises(LensError, match="layers of 'albert' share their modules"):
        sublayers(model)


def test_writers_of_bert_are_not_its_sums():
    """Without what these modules write a block only norms the stream."""
    model = lens.load(layout_model("bert"))
    parts = sublayers(model)[1]
    assert parts.attention is model.model.bert.encoder.layer[1].attention.output.dense
    assert parts.mlp is model.model.bert.encoder.layer[1].output.dense


def test_a_head_that_is_not_linear_has_no_unembedding_matrix(models):
    with pytest.raises(
        LensError, match="BertPredictionHeadTransform between its last norm and its"
    ):
        proved(models("bert")).unembed_weight()
    headless = lens.load(models("gpt2").model.transformer)
    assert replay_error(layout(headless)) < 5e-6
    with pytest.raises(LensError, match="GPT2Model has no unembedding that is known here"):
        layout(headless).unembed_weight()


@pytest.mark.parametrize(
    ("kind", "name", "changed"),
    [
        ("llama", "LlamaForSequenceClassification", {}),
        ("gpt2", "GPT2ForTokenClassification", {}),
        ("bert", "BertForSequenceClassification", {}),
        ("vit", "ViTForMaskedImageModeling", {}),
        ("vit", "ViTForImageClassification", {"num_labels": 0}),
    ],
)
def test_models_with_another_head_are_proved_up_to_it(kind, name, changed):
    library: Any = transformers
    config = layout_model(kind, **changed).config
    model = lens.load(getattr(library, name)(config).eval())
    assert replay_error(proved(model)) < 5e-6
    assert len(lens.heads.weights.composition(model)) > 0
    with pytest.raises(LensError, match="has no unembedding that is known here"):
        proved(model).unembed_weight()
