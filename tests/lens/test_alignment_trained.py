"""A small model that was trained to reverse what it reads: its cross-attention points where the task says, and no other's."""

import pytest
import torch
import transformers

import lens
from lens.models.random_weights import random_weights

LENGTH, SYMBOLS = 7, 12


def drawn(count, seed):
    """Sources of different symbols, and what the decoder reads: the start and the source from its end on."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(SYMBOLS, generator=generator)[:LENGTH] + 3 for _ in range(count)]
    sources = torch.stack(rows)
    start = torch.full((count, 1), 2)
    return sources, torch.cat([start, sources.flip(1)], 1)


@pytest.fixture(scope="module")
def reverser():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=SYMBOLS + 3, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=2, forced_eos_token_id=None, bos_token_id=2, init_std=0.15,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        sources, targets = drawn(64, step)
        logits = model(input_ids=sources, decoder_input_ids=targets[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return lens.load(model.eval())


def test_the_head_that_does_the_task_is_found(reverser):
    sources, targets = drawn(8, 10_000)  # held back: none of these was trained on, or hardly one
    pairs = list(zip(sources.tolist(), targets[:, :-1].tolist(), strict=True))
    with torch.no_grad():
        guessed = reverser.model(
            input_ids=sources, decoder_input_ids=targets[:, :-1]
        ).logits.argmax(-1)
    assert (guessed == targets[:, 1:]).float().mean() > 0.95
    labels = [{token: LENGTH - token for token in range(1, LENGTH)}] * len(
        pairs
    )  # token t is predicted from there
    part = reverser.part("cross")
    found = lens.traces.alignment(
        lens.capture(part, pairs, keep_qk=True, progress=False), labels, at="predicted"
    )
    best = found.table().iloc[0]
    assert best["accuracy"] > 0.9
    assert best["chance"] == pytest.approx(1 / LENGTH)
    assert best["mass"] > 0.5
    assert best["monotonicity"] < -0.9, "it goes through the source backwards"
    random = random_weights(reverser, 0).part("cross")
    other = lens.traces.alignment(
        lens.capture(random, pairs, progress=False), labels, at="predicted"
    ).table()
    assert other["accuracy"].max() < 0.5
    worth = lens.heads.importance(part, pairs, baseline="pooled_mean", progress=False).table()
    assert worth.sort_values("value").iloc[-1]["name"] in set(found.table()["name"][:2])
    assert worth["value"].max() > 0.3, "the other stands in for it"
