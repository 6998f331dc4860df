"""`eap-ig-activations` is what the code of EAP-IG gives, on two random models that it was run on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.circuits import score_edges
from lens.circuits.scores import attribution
from lens.circuits.scores.methods import EapIg
from lens.tasks import Task

PUBLISHED = json.loads((Path(__file__).parent / "data/eapig_activations.json").read_text())
"""Kind of model -> edge -> score by hannamw/EAP-IG on TransformerLens 2.16, 5 steps."""
VOCAB = 160
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


def the_model(kind):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            drawn = torch.randn(weights.shape, generator=generator)
            if weights.dim() >= 2:
                embeds = any(part in name for part in ("emb", "wte", "wpe"))
                weights.copy_(drawn * (0.8 if embeds else 1.2 / weights.shape[-1] ** 0.5))
            elif name.endswith("weight"):
                weights.add_(0.1 * drawn)
            else:
                weights.copy_(0.2 * drawn)
    return lens.load(model.eval())


def the_task():
    clean = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(3))
    corrupt = clean.clone()
    for place, shift in ((4, 4), (7, 40)):
        corrupt[:, place] = (clean[:, place] + shift) % 157 + 3
    right, wrong = torch.tensor([[5, 9], [6, 10], [7, 30]]).split(1, 1)
    at = torch.full((3, 1), 9)
    return Task("drawn", clean, at, right, "logit_difference", corrupt=corrupt, wrong=wrong)


@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_are_as_published_and_stages_are_not(kind):
    model, task = the_model(kind), the_task()
    found = score_edges(model, task, method=EapIg(5, "left", "activations"))
    published = np.array([PUBLISHED[kind][edge] for edge in found.graph.edges])
    assert len(published) == len(PUBLISHED[kind])
    assert np.abs(found.values - published).max() < 1e-4 * np.abs(published).max()
    ours = score_edges(model, task, method=EapIg(5, "left", "stages"))
    assert np.abs(ours.values - published).max() > 0.1 * np.abs(published).max()


@pytest.mark.parametrize("name", ["_KEPT", "_NUMBERS"])
def test_in_little_memory_the_scores_are_the_same(monkeypatch, name):
    """Writers' outputs made anew where they are met; one row at a time."""
    model, task, method = the_model("llama"), the_task(), EapIg(2, "left")
    whole = score_edges(model, task, method=method).values
    monkeypatch.setattr(attribution, name, 0)
    again = score_edges(model, task, method=method).values
    assert np.abs(again - whole).max() < 1e-5 * np.abs(whole).max()
