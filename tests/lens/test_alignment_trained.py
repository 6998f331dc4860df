"""A small Marian that was trained to translate word for word, in another order: its cross-attention points at the words.

Two made-up languages: determiner, adjective or none, noun, verb, and so on; in the other the adjective follows its noun
and the verb comes last. Which word stands for which is known by construction.
"""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.models.random_weights import random_weights

FIRST = {"D": 3, "A": 6, "N": 12, "V": 20}  # of each kind of word; 26 words
OTHER = 23  # a word of the target is that of the source and so many
PATTERNS = {  # kinds of the source -> where each word of the target stands in it
    "DNVDN": (0, 1, 3, 4, 2),
    "DANVDN": (0, 2, 1, 4, 5, 3),
    "DNVDAN": (0, 1, 3, 5, 4, 2),
    "DANVDAN": (0, 2, 1, 4, 6, 5, 3),
}


def drawn(count, seed, kinds):
    """Sources with their end, and what the decoder reads and shall write."""
    generator = torch.Generator().manual_seed(seed)
    words = {"D": 3, "A": 6, "N": 8, "V": 6}
    drawn = [
        torch.randint(FIRST[kind], FIRST[kind] + words[kind], (count, 1), generator=generator)
        for kind in kinds
    ]
    source = torch.cat(drawn, 1)
    target = source[:, list(PATTERNS[kinds])] + OTHER
    return (
        torch.cat([source, torch.ones(count, 1, dtype=torch.long)], 1),
        torch.cat([torch.full((count, 1), 2), target], 1),
    )


@pytest.fixture(scope="module")
def translator():
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=3 + 2 * OTHER, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=2, bos_token_id=2, forced_eos_token_id=None, init_std=0.15, scale_embedding=True,
    )  # fmt: skip
    model = transformers.MarianMTModel(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(150):
        sources, targets = drawn(48, step, list(PATTERNS)[step % 4])
        logits = model(input_ids=sources, decoder_input_ids=targets[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return lens.load(model.eval())


def test_the_head_that_aligns_words_is_found(translator):
    pairs, labels, right = [], [], []
    for number, (kinds, order) in enumerate(PATTERNS.items()):  # other sentences than in training
        sources, targets = drawn(6, 10_000 + number, kinds)
        with torch.no_grad():
            logits = translator.model(input_ids=sources, decoder_input_ids=targets[:, :-1]).logits
        right.append((logits.argmax(-1) == targets[:, 1:]).float().mean())
        pairs += zip(sources.tolist(), targets[:, :-1].tolist(), strict=True)
        labels += [{token + 1: place for token, place in enumerate(order)}] * len(sources)
    assert min(right) > 0.95
    part = translator.part("cross")
    traces = lens.capture(part, pairs, keep_qk=True, progress=False)
    found = lens.traces.alignment(traces, labels, at="predicted")
    best = found.table().iloc[0]
    assert best["accuracy"] > 0.8
    assert best["accuracy_low"] > 0.7
    assert best["accuracy_low"] > 5 * best["chance"]
    assert best["chance"] == pytest.approx(np.mean([1 / len(source) for source, _ in pairs]))
    assert best["mass"] > 0.7
    assert 0.4 < best["monotonicity"] < 0.9, "words change places, and most go on"
    by_hand = [  # the strongest key of each row, by the probabilities themselves
        float(np.mean([row.argmax() == own[at + 1] for at, row in enumerate(rows)]))
        for trace, own in zip(traces, labels, strict=True)
        for rows in [
            trace.tile(int(best["layer"]), int(best["head"]), (0, trace.queries), (0, trace.length))
        ]
    ]
    assert np.mean(by_hand) == pytest.approx(best["accuracy"], abs=1e-9)
    random = random_weights(translator, 0).part("cross")
    other = lens.traces.alignment(
        lens.capture(random, pairs, progress=False), labels, at="predicted"
    ).table()
    assert other["accuracy_high"].max() < 0.5
    worth = lens.heads.importance(part, pairs, baseline="pooled_mean", progress=False).table()
    assert worth.sort_values("value").iloc[-1]["name"] == best["name"]
    assert worth["value"].max() > 0.5
