"""Model families: captured where their attention is a softmax, and equal to `eager`; else refused in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

import lens
from lens import edits
from lens.common.errors import LensError
from lens.figures.heads import head_grid, metric_by_layer
from lens.passes.interface import switched
from lens.passes.tiny_inputs import tiny_inputs
from lens.traces.profiles import prompt_table
from tests.lens.architectures import TEXT

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}
SOUND: dict[str, Any] = {**SIZES, "conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4}
MOE: dict[str, Any] = {
    **TEXT,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SPARSE: dict[str, Any] = {
    **{**TEXT, "num_key_value_heads": 6},
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
}
WHISPER: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_layers": 1,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 56,
    "vocab_size": 97,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
}
GEMMA4: dict[str, Any] = {
    **{**TEXT, "num_hidden_layers": 4},
    "head_dim": 8,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0,
}

INKLING: dict[str, Any] = {
    **{name: TEXT[name] for name in TEXT if "intermediate" not in name},
    **{"num_hidden_layers": 2, "layer_types": ["hybrid_sliding", "hybrid"], "head_dim": 8},
    **{"swa_num_attention_heads": 6, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    **{
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "rel_extent": 16,
    },
    **{"sliding_window_size": 7, "unpadded_vocab_size": 97, "n_layers_per_attn_res_block": 1},
}


def pictured(kind: str) -> Any:
    """BLIP-2 or InstructBLIP with OPT."""
    parts: dict[str, Any] = {"vision_config": IMAGE, "num_query_tokens": 5, "image_token_index": 96}
    parts["qformer_config"] = {**SIZES, "encoder_hidden_size": 48, "vocab_size": 97}
    opt = {
        "model_type": "opt",
        "ffn_dim": 56,
        "word_embed_proj_dim": 48,
        "vocab_size": 97,
        "pad_token_id": 1,
    }
    parts["text_config"] = {**SIZES, **opt, "max_position_embeddings": 64}
    return getattr(hf, f"{kind}ForConditionalGeneration")(getattr(hf, f"{kind}Config")(**parts))


CAPTURED: dict[str, Callable[[], Any]] = {
    "gemma4": lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**GEMMA4)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**MOE)),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE, num_register_tokens=3)),
    "beit": lambda: hf.BeitModel(hf.BeitConfig(**IMAGE)),
    "clip's image tower": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)),
    "videomae": lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**IMAGE, num_frames=4)),
    "whisper's encoder": lambda: hf.WhisperModel(hf.WhisperConfig(**WHISPER)).get_encoder(),
    "wav2vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SOUND, num_conv_pos_embeddings=16)),
    "ast": lambda: hf.ASTModel(hf.ASTConfig(**SIZES, max_length=48, num_mel_bins=16, patch_size=8)),
    "layoutlm": lambda: hf.LayoutLMModel(hf.LayoutLMConfig(**SIZES, vocab_size=97)),
    "vit mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**IMAGE, mask_ratio=0.3)),
    "trocr": lambda: hf.TrOCRForCausalLM(
        hf.TrOCRConfig(
            d_model=48, decoder_layers=3, decoder_attention_heads=6, vocab_size=97, pad_token_id=0
        )
    ),
}


def built(make: Callable[[], Any], size: float = 4) -> Any:
    """In eval mode; weights that are `size` times as large make attention that is far from uniform."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(size)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CAPTURED)
def test_probabilities_and_output_are_those_of_eager(name):
    model = built(CAPTURED[name], 1 if name == "gemma4" else 4)
    model = model.double() if name == "gemma4" else model  # its logits have no scale and are large
    loaded = lens.load(model)
    inputs = tiny_inputs(loaded)
    with switched(model, "eager"):
        own = model(**inputs, output_attentions=True)
    trace = lens.capture(loaded, inputs, block_size=1, progress=False)
    assert len(trace.layers) == len(own.attentions)
    for found, weights in zip(trace.block_mass.values, own.attentions, strict=True):
        assert (torch.from_numpy(found) - weights[0]).abs().max() < 1e-5
    with lens.traces.capturing(loaded):
        assert (model(**inputs)[0] - own[0]).abs().max() < 1e-4 * own[0].abs().max()


def _on_meta():
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def _offloaded():
    import accelerate

    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    return accelerate.cpu_offload(model, execution_device="cpu")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Blip2", "InstructBlip"])
def test_the_language_model_of_blip_2_reads_a_picture_in_its_text(kind):
    model = built(lambda: pictured(kind))
    loaded = lens.load(model)
    inputs = tiny_inputs(loaded)
    trace = lens.capture(loaded, inputs, block_size=1, progress=False)
    with switched(model, "eager"):
        found = model(**inputs, output_attentions=True).language_model_outputs
    assert (model.language_model(inputs["input_ids"])[0] - found[0]).abs().max() > 1e-2  # it looks
    assert trace.tokens[:6] == ["96"] * 5 + [str(int(inputs["input_ids"][0, 5]))]
    for maps, weights in zip(trace.block_mass.values, found.attentions, strict=True):
        assert (torch.from_numpy(maps) - weights[0]).abs().max() < 1e-5
    for run, said in [
        (lambda: lens.heads.weights.composition(loaded), "runs on no text without a picture"),
        (lambda: lens.capture(loaded, [5, 6], progress=False), "missing .* 'pixel_values'"),
        (lambda: loaded.logits([5, 6]), "cannot run on token ids alone .* all that it reads"),
        (lambda: lens.effect(loaded, [[5, 6]], edits.Mask("first")), "cannot run this prompt: "),
    ]:
        with pytest.raises(LensError, match=said):
            run()


@torch.no_grad()
def test_patches_that_are_left_out_are_said_and_named():
    model = built(CAPTURED["vit mae"])
    loaded = lens.load(model)
    pixels = torch.randn(1, 3, 16, 16)
    with pytest.raises(LensError, match=r"leaves patches out by noise .*config\.mask_ratio = 0\.0"):
        lens.capture(loaded, {"pixel_values": pixels}, progress=False)
    noise = torch.arange(16.0).flip(0)[None]
    given = {"pixel_values": pixels, "noise": noise}
    assert lens.capture(loaded, given, progress=False).tokens == [
        "[CLS]", *(f"{row},{column}" for row in (3, 2, 1) for column in (3, 2, 1, 0))
    ][:12]  # fmt: skip
    model.config.mask_ratio = 0.0
    whole = lens.capture(loaded, given | {"noise": -noise}, progress=False)
    assert whole.attrs["patches"] == {"first": 1, "height": 4, "width": 4}


@torch.no_grad()
def test_a_sink_of_each_query_takes_its_share():
    model = built(lambda: hf.Inkling2ForCausalLM(hf.Inkling2TextConfig(**INKLING)), 1)
    ids = torch.randint(3, 97, (1, 19), generator=torch.Generator().manual_seed(3))
    trace = lens.capture(lens.load(model), ids[0].tolist(), block_size=1, progress=False)
    with switched(model, "eager"):
        own = model(ids, output_attentions=True).attentions
    assert len(own) == len(trace.layers) == 2
    for maps, weights in zip(trace.block_mass.values, own, strict=True):
        assert (torch.from_numpy(maps) - weights[0]).abs().max() < 1e-5
        assert weights.sum(-1).min() < 0.9


@torch.no_grad()
@pytest.mark.parametrize("kind", ["GlmMoeDsa", "DeepseekV32"])
def test_sparse_attention_of_an_indexer_is_captured(kind):
    """Rows see the keys that the indexer chose for them, eight at most, and no others."""
    config = getattr(hf, f"{kind}Config")(**SPARSE)
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForCausalLM")(config).eval()
    loaded = lens.load(model)
    ids = torch.randint(3, 97, (1, 19), generator=torch.Generator().manual_seed(3))
    trace = lens.capture(loaded, ids[0].tolist(), block_size=1, progress=False)
    with switched(model, "eager"):
        own = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(own):
        found = torch.from_numpy(trace.block_mass.values[layer])
        assert (found - weights[0]).abs().max() < 1e-5
        assert ((found > 0).sum(-1) <= 8).all()
    assert int(trace.visible.values[0].sum()) < 19 * 20 // 2


class _Random(hf.ViTModel):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.last_hidden_state += torch.rand(())
        return found


def _random():
    return _Random(hf.ViTConfig(**IMAGE))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "yoso": (
        lambda: hf.YosoModel(hf.YosoConfig(**SIZES, vocab_size=97, use_expectation=True)),
        "cannot reach the attention of YosoModel",
    ),
    "random": (
        _random,
        "_Random is random: run twice on a tiny prompt it gives two different outputs",
    ),
    "no attention": (
        lambda: hf.FNetModel(hf.FNetConfig(hidden_size=48, num_hidden_layers=2, vocab_size=97)),
        "cannot read the sizes of FNetModel: its FNetConfig has no integer num_attention_heads",
    ),
    "on the meta device": (_on_meta, "weights of LlamaForCausalLM are not in memory"),
    "offloaded": (_offloaded, "weights of LlamaForCausalLM are not in memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_in_one_line(name):
    make, expected = REFUSED[name]
    with pytest.raises(LensError, match=expected) as caught:
        lens.load(make().eval())
    assert "\n" not in str(caught.value)


def test_layers_that_attend_to_other_places_are_refused_by_capture():
    model = hf.BertModel(hf.BertConfig(**SIZES, vocab_size=97)).eval()
    attention = model.encoder.layer[0].attention
    once = attention.forward
    attention.forward = lambda states, *a, **given: once(once(states, *a, **given)[0], *a, **given)
    loaded = lens.load(model)
    with pytest.raises(LensError, match="layer 0 of BertModel attends 2 times"):
        lens.capture(loaded, list(range(32, 60)), progress=False)


def test_more_positions_than_tokens_are_refused_by_capture():
    """CpmAnt puts positions of its own before the text; it ended in a raw error."""
    given = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "dim_ff": 64,
        "dim_head": 12,
    }
    config = hf.CpmAntConfig(**given, vocab_size=97, prompt_length=5)
    loaded = lens.load(hf.CpmAntForCausalLM(config).eval())
    with pytest.raises(LensError, match="attends from 33 to 33 positions where the prompt has 28"):
        lens.capture(loaded, list(range(32, 60)), progress=False)
    with lens.traces.capturing(loaded) as recorder, torch.no_grad():
        loaded.model(input_ids=torch.arange(32, 60)[None])
    assert [one.keys for one in recorder.records] == [33, 33]


@pytest.mark.parametrize("name", ["text-lm-3l", "own"])
def test_float64_is_float64(name):
    if name == "own":
        loaded = lens.load(built(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))).double())
    else:
        loaded = lens.load(name, dtype="float64")
    assert loaded.dtype == torch.float64
    assert loaded.check is not None
    assert loaded.check < 1e-6  # transformers' own softmax is float32 there
    single = lens.load(built(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))))
    ids = list(range(3, 30))
    if name == "own":
        found, expected = (lens.capture(one, ids, progress=False) for one in (loaded, single))
        assert abs(found.received.values - expected.received.values).max() < 1e-4


def test_layers_of_different_heads_keep_no_q_and_k():
    loaded = lens.load(built(CAPTURED["gemma4"]))
    trace = lens.capture(loaded, list(range(3, 20)), progress=False)
    assert len(trace.layers) == 4
    with pytest.raises(LensError, match="do not fit into one trace: capture without keep_qk"):
        lens.capture(loaded, list(range(3, 20)), keep_qk=True, progress=False)


def test_what_is_no_loaded_model_and_no_trace_is_said_so():
    own = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    with pytest.raises(LensError, match=r"got 'text-lm-3l'; pass lens\.load\('text-lm-3l'\)"):
        lens.capture("text-lm-3l", "a text")
    with pytest.raises(LensError, match=r"got a LlamaForCausalLM; pass lens\.load\(it\)"):
        lens.capture(own, [3, 4, 5])
    with pytest.raises(LensError, match="got a LlamaForCausalLM"), lens.traces.capturing(own):
        pass
    with pytest.raises(LensError, match=r"traces must be an AttentionTrace .*got 'x'"):
        lens.profile("x")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: lens.edit(model, lens.edits.Mask("first")).__enter__(),
        lambda model: lens.heads.activity(model, "a text"),
        lambda model: lens.heads.retrieval(model, None),
        lambda model: lens.tasks.take(model, "a text", 4),
        lambda model: lens.tasks.loss(model, ["a text"]),
        lambda model: lens.vision.segments(model, {}),
        lambda model: lens.models.random_weights(model),
        lambda model: lens.heads.weights.composition(model),
    ],
)
def test_functions_that_take_a_model_say_what_is_none(call):
    with pytest.raises(LensError, match=r"got 'text-lm-3l'; pass lens\.load"):
        call("text-lm-3l")


def test_a_model_that_changes_what_it_reads_is_run_whole():
    model = built(lambda: hf.DPRQuestionEncoder(hf.DPRConfig(**SIZES, vocab_size=97)))
    ids = torch.tensor([[5, 0, 7, 0, 9, 11, 0, 13]])  # 0 is padding to the model that wraps it
    with torch.no_grad(), switched(model, "eager"):
        own = model(ids, output_attentions=True).attentions
    trace = lens.capture(lens.load(model), ids[0], block_size=1, progress=False)
    for found, weights in zip(trace.block_mass.values, own, strict=True):
        assert (torch.from_numpy(found) - weights[0]).abs().max() < 1e-5


def test_a_metric_of_a_users_own_is_drawn():
    table = prompt_table(lens.capture(lens.load(), "It was the best of times"), "text")
    mine = table[table["metric"] == "sink_rate"].assign(metric="mine<b>")
    assert head_grid(mine, "mine<b>").layout.title.text.startswith(
        "mine&lt;b&gt; (no unit): highest"
    )
    assert "mine&lt;b&gt;" in metric_by_layer(mine, "mine<b>").layout.title.text
    with pytest.raises(LensError, match="no rows of 'mine'"):
        head_grid(table, "mine")
