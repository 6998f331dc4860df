"""The cache of a real `TransformerBridge` gives the trace that capture gives of the bare model."""

import copy
import shutil

import pytest
import torch

import lens
from lens.models.catalogue import KNOWN
from lens.traces import from_transformer_lens
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

pytestmark = pytest.mark.slow  # importing TransformerLens alone takes five seconds


def test_a_cache_is_the_trace_of_the_bare_model(tmp_path, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(KNOWN["text-lm-3l"].folder / file, tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model))
    ids = [5, 9, 7, 11, 5, 9, 8, 3, 4, 5, 9]
    _, cache = bridge.run_with_cache(torch.tensor([ids]))
    found = from_transformer_lens(cache, token_ids=ids, block_size=4)
    captured = lens.capture(lens.load(model), ids, block_size=4)
    for name in set(captured.dataset.data_vars) - {"lse", "max_logit"}:
        assert rms_ratio(found.dataset[name], captured.dataset[name]) < 1e-5, name
