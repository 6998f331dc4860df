"""Importance on a `TransformerBridge` is that of the bare model."""

import copy

import numpy as np
import pytest
import torch

import lens
from lens.heads import importance
from lens.heads.weights import copying
from lens.tasks import Task
from tests.lens.architectures import build, save_tokenizer

pytestmark = pytest.mark.slow  # importing TransformerLens alone takes five seconds


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_bridge_gives_the_scores_of_the_bare_model(name, tmp_path, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build(name)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model))
    bare, bridged = lens.load(model), lens.load(bridge)
    clean, corrupt = torch.randint(3, 97, (2, 3, 13), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(3, -1)
    task = Task("random", clean, positions, clean[:, 1:], "loss", corrupt)
    for by in ("ablation", "gradient", "attribution"):
        expected = importance(bare, task, method=by, progress=False).per_prompt
        found = importance(bridged, task, method=by, progress=False).per_prompt
        assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 1e-3
    assert np.allclose(copying(bridged)["eigenvalue"], copying(bare)["eigenvalue"], atol=1e-4)
