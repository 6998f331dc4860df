"""A section that a model does not allow is `unsupported` with its reason, and the run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from lens_analyses.steps import STEPS

import lens
from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.validation import validate
from tests.tiers import first

ASSETS = Path(lens.__file__).parent / "assets/models/stories260k"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 8}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
SHAPES = {
    "qwen3": GROUPED,
    "gemma2": {**GROUPED, **WINDOW},
    "gemma3_text": {**GROUPED, **WINDOW},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 1},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt_oss": {**GROUPED, **WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mistral": {**GROUPED, **WINDOW},
}
ENCODERS = {"bert": {}, "albert": {"embedding_size": 8}}
CAUSAL_ONLY = {
    *("mechanism", "kinds", "effects", "first_token", "dose", "redistribution", "streaming")
}


def saved(kind, options, head, folder):
    """A random model of this shape with the tokenizer of an embedded one, in a folder."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**SIZES | options)
    head.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    return folder


def sinks_of(lens_command, folder, out):
    answer = lens_command(
        "sinks", "--model", folder, "--text-name", "moby-dick", "--tokens", "18", "--windows", "2",
        "--edits", "mask", "--amounts", "1", "--set", "prompts.copied=0", "--set",
        "analysis.length=18", "--out", out, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


@pytest.mark.parametrize("kind", first(SHAPES, "gpt_oss"))
def test_every_section_of_a_decoder_is_there(kind, lens_command, tmp_path):
    head = transformers.AutoModelForCausalLM
    run = sinks_of(lens_command, saved(kind, SHAPES[kind], head, tmp_path / kind), tmp_path)
    assert run.unsupported == {}
    assert run.sections == [step.name for step in STEPS["sinks"]]


@pytest.mark.parametrize("kind", first(ENCODERS, "bert"))
def test_an_encoder_has_the_sections_that_it_can_have(kind, lens_command, tmp_path):
    head = transformers.AutoModelForMaskedLM
    run = sinks_of(lens_command, saved(kind, ENCODERS[kind], head, tmp_path / kind), tmp_path)
    assert run.status == "success"
    assert run.sections == ["detection"]
    assert set(run.unsupported) == CAUSAL_ONLY | {"spectrum"}
    assert "layer 0 sees later tokens" in run.unsupported["mechanism"]
    assert validate(run) == []
    report = json.loads((run.path / "report.json").read_text())
    assert report["unsupported"] == run.unsupported
    page = (run.path / "report.html").read_text()
    for name, reason in run.unsupported.items():
        assert f"<li>{name.replace('_', ' ')}: {reason}</li>" in page
    with pytest.raises(LensError, match="mechanism is unsupported here: layer 0 sees later"):
        run.section("mechanism")
