"""Adapters of PEFT, 4 and 8 bit of bitsandbytes, GGUF files: captured as they are, weights read as they work."""

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lens
from lens.common.errors import LensError
from lens.models import adapters
from lens.models.weights import matrix
from lens.passes.replay import proved

MISSING = [one for one in ("gguf", "peft", "bitsandbytes") if not importlib.util.find_spec(one)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]
IDS = [3, 5, 7, 9, 2, 4, 8]
KINDS = {
    "lora": (
        "LoraConfig",
        {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": False},
    ),
    "dora": (
        "LoraConfig",
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "use_dora": True},
    ),
    "ia3": (
        "IA3Config",
        {
            "target_modules": ["k_proj", "o_proj"],
            "feedforward_modules": ["o_proj"],
            "init_ia3_weights": False,
        },
    ),
    "oft": (
        "OFTConfig",
        {"target_modules": ["q_proj"], "init_weights": False, "oft_block_size": 8},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    """Imported by the tests: while they are collected every worker would wait two seconds for them."""
    global gguf, peft, bnb
    import bitsandbytes as bnb
    import gguf
    import peft


def _tiny(layers=2):
    """Sizes that GGUF and 4 bit take: blocks of 32 numbers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=64, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and beside it an adapter of each kind."""
    place = tmp_path_factory.mktemp("models")
    _tiny().save_pretrained(place / "base")
    for number, (kind, (made_by, options)) in enumerate(KINDS.items()):
        base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
        torch.manual_seed(number)
        made = peft.get_peft_model(base, getattr(peft, made_by)(**options))
        with torch.no_grad():
            for name, one in made.named_parameters():
                if "ia3" in name:
                    one.copy_(1 + 0.3 * torch.randn_like(one))
        made.save_pretrained(place / kind)
    return place


def _adapted(folder, kind):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / kind).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_models_are_captured_and_their_weights_are_those_of_the_merged_model(folder, kind):
    model = lens.load(_adapted(folder, kind))
    trace = lens.capture(model, IDS, block_size=1, progress=False)
    with torch.no_grad():
        own = _adapted(folder, kind)
        own.set_attn_implementation("eager")
        eager = own(torch.tensor([IDS]), output_attentions=True)
    for found, weights in zip(trace.block_mass.values, eager.attentions, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), weights[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(IDS), eager.logits[0], atol=1e-5, rtol=1e-5)

    merged = lens.load(_adapted(folder, kind).merge_and_unload())
    plain = lens.load(str(folder / "base"))
    changed = 0.0
    for ours, theirs, base in zip(
        *(proved(one).blocks for one in (model, merged, plain)), strict=True
    ):
        pairs = [*zip(ours.weights, theirs.weights, strict=True)]
        for (weight, _), (expected, _) in [*pairs, ((ours.output, None), (theirs.output, None))]:
            torch.testing.assert_close(weight, expected, atol=2e-5, rtol=1e-4)
        changed += float((ours.weights[0][0] - base.weights[0][0]).abs().max())
        changed += float((ours.output - base.output).abs().max())
    assert changed > 0.1


def test_a_folder_with_an_adapter_finds_its_base_beside_it(folder, tmp_path):
    moved = tmp_path / "moved"
    for name in ("base", "lora"):
        shutil.copytree(folder / name, moved / name)
    settings = json.loads((moved / "lora" / adapters.CONFIG).read_text())
    settings["base_model_name_or_path"] = "/where/it/was/trained/base"
    (moved / "lora" / adapters.CONFIG).write_text(json.dumps(settings))
    found = lens.load(str(moved / "lora"))
    assert found.name == "lora"
    assert found.info.parameters > lens.load(str(moved / "base")).info.parameters
    torch.testing.assert_close(found.logits(IDS), lens.load(_adapted(folder, "lora")).logits(IDS))


def test_adapters_that_cannot_be_taken_say_why(folder, tmp_path, monkeypatch):
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    added = peft.get_peft_model(base, prefix).eval()
    with pytest.raises(LensError, match=r"prefix tuning puts keys or tokens of its own"):
        lens.load(added)
    added.save_pretrained(folder / "prefix")
    with pytest.raises(LensError, match=r"prefix tuning puts keys or tokens of its own"):
        lens.load(str(folder / "prefix"))
    other = tmp_path / "other"
    shutil.copytree(folder / "lora", other)
    _tiny(1).save_pretrained(tmp_path / "base")
    settings = json.loads((other / adapters.CONFIG).read_text())
    (other / adapters.CONFIG).write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    with pytest.raises(LensError, match=r"not of this LlamaForCausalLM: .*layers\.\d.* in one of"):
        lens.load(str(other))
    (other / adapters.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(LensError, match="does not say whose adapter it is"):
        lens.load(str(other))
    (other / adapters.CONFIG).write_text("{")
    with pytest.raises(LensError, match=r"cannot read .*adapter_config.json"):
        lens.load(str(other))
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LensError, match="holds an adapter, which peft reads: pip install peft"):
        lens.load(str(folder / "lora"))


def test_4_bit_weights_are_read_as_they_work_and_8_bit_ones_are_refused(folder, caplog):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    root = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=settings)
    layer = root.model.layers[1].self_attn.o_proj
    # Before the first pass: on some processors that packs the weights anew.
    stored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    model = lens.load(root.eval())
    assert model.info.parameters == lens.load(str(folder / "base")).info.parameters
    assert lens.capture(model, IDS, progress=False).layers
    weight, _ = matrix(layer, model)
    torch.testing.assert_close(weight, stored.T, atol=1e-2 * float(stored.abs().max()), rtol=0)
    assert len(lens.heads.weights.composition(model))

    settings = BitsAndBytesConfig(load_in_8bit=True)
    root = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=settings)
    model = lens.load(root.eval())
    assert lens.capture(model, IDS, progress=False).layers
    assert caplog.text.count("inputs will be cast") == 1  # 14 layers
    with pytest.raises(LensError, match=r"a Linear8bitLt does not compute x W \+ b"):
        proved(model)


def _rotary_pairs(weight, heads):
    """Rows as llama.cpp keeps them: the two halves of a rotary pair side by side."""
    return (
        weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
    )


def _write(model, file, kind, tokens):
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            few = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = _rotary_pairs(array, few)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 2:
            writer.add_tensor(theirs, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, array)
    if tokens:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
        writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_alone_and_by_its_folder(tmp_path):
    root = _tiny()
    vocab = root.config.vocab_size
    tokens = ["<unk>", "<s>", "</s>", *(chr(number) for number in range(97, 94 + vocab))]
    file = tmp_path / "tiny.gguf"
    _write(root, file, gguf.GGMLQuantizationType.F32, tokens[:vocab])
    with torch.no_grad():
        own = root(torch.tensor([IDS])).logits[0]
    for given in (str(file), str(tmp_path)):
        found = lens.load(given)
        assert (found.name, found.info.class_name) == ("tiny", "LlamaForCausalLM")
        torch.testing.assert_close(found.logits(IDS), own)
        assert found.encode("cab")[0] == 1
        assert found.token_strings(found.encode("cab"))[-3:] == ["c", "a", "b"]
    _write(root, file, gguf.GGMLQuantizationType.Q8_0, None)
    found = lens.load(str(file))
    stored = gguf.quantize(root.lm_head.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    torch.testing.assert_close(found.model.lm_head.weight.detach(), torch.from_numpy(expected))
    assert found.tokenizer is None
    assert proved(found)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(LensError, match=r"tiny.gguf is damaged or not all there"):
        lens.load(str(file))
    file.write_bytes(b"PK\3\4")
    with pytest.raises(LensError, match="is no GGUF file: it does not begin with GGUF"):
        lens.load(str(file))


def test_what_is_rounded_before_it_is_multiplied_has_no_one_weight(folder):
    """As torchao notes it on its weights; that package is not among those of the tests."""
    loaded = lens.load(str(folder / "base"))
    lens.heads.weights.composition(loaded)
    assert loaded.precision == torch.float32
    for one in loaded.model.modules():
        if isinstance(one, torch.nn.Linear):
            one.weight.act_quant_kwargs = {"granularity": "row"}
    rounded = lens.load(loaded.model)
    assert rounded.precision == torch.bfloat16
    with pytest.raises(LensError, match="rounds what it reads to 8 bit"):
        lens.heads.weights.composition(rounded)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_layers_that_torch_quantised_are_refused(folder):
    """Gradients through them were None, and the importance by gradients of every head was 0."""
    root = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    quantised = torch.ao.nn.quantized.dynamic.Linear(32, 32)
    root.model.layers[1].self_attn.o_proj = quantised
    with pytest.raises(LensError, match=r"torch quantised \(torch.ao.nn.quantized.dynamic.*8 bit"):
        lens.load(root)
    root.model.layers[1].self_attn.o_proj = torch.ao.nn.intrinsic.quantized.dynamic.LinearReLU(
        32, 32
    )
    for take in (lens.load, lambda module: lens.passes.wrap(module, torch.arange(9)[None])):
        with pytest.raises(
            LensError, match=r"torch quantised \(torch.ao.nn.intrinsic.quantized.*8 bit"
        ):
            take(root)


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm"])
def test_weights_whose_reader_is_missing_are_refused_in_one_line(folder, tmp_path, method):
    shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        LensError, match=rf"are quantised \({method}\), and cannot be .*: .*install"
    ):
        lens.load(str(tmp_path / "base"))
