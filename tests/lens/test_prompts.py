"""Texts, copied prompts, cutting and losses."""

import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.tasks import prompts
from tests.lens.architectures import build


@pytest.mark.parametrize("name", prompts.TEXTS)
def test_texts_are_there_and_have_a_title(name):
    text = prompts.text(name)
    assert len(text) > 1000
    assert "Gutenberg" not in text
    assert prompts.TEXTS[name].title


def test_an_unknown_text_is_refused():
    with pytest.raises(LensError, match="unknown text 'ulysses'; known: moby-dick, pride-and"):
        prompts.text("ulysses")


def test_take_cuts_to_tokens_and_says_when_it_cannot():
    model = lens.load()
    text = prompts.text("moby-dick")
    ids = prompts.take(model, text, 100)
    assert ids == model.encode(text)[:100]
    assert ids[0] == model.bos_id
    for wrong in (0, 129):
        with pytest.raises(LensError, match=f"tokens must be 1 to 128 for text-lm-3l, got {wrong}"):
            prompts.take(model, text, wrong)
    with pytest.raises(LensError, match=r"the text has \d tokens of text-lm-3l, 99 were asked for"):
        prompts.take(model, "Ahab!", 99)


def test_the_story_fits_the_story_model():
    model = lens.load("stories260k")
    ids = model.encode(prompts.text("lily"))
    assert 400 < len(ids) <= 512
    assert prompts.loss(model, ids) < 1.4


def test_copied_prompts_repeat_after_bos_and_follow_the_seed():
    model = lens.load()
    ids = prompts.copied(model, 50, seed=3)
    assert ids[0] == model.bos_id
    assert ids[1:51] == ids[51:]
    assert not set(ids[1:]) & set(model.tokenizer.all_special_ids)
    assert ids == prompts.copied(model, 50, seed=3)
    assert ids != prompts.copied(model, 50, seed=4)
    assert len(prompts.copied(lens.load(build("llama")), 5)) == 10


def test_every_ordinary_token_is_drawn_and_no_special_one():
    model = lens.load("induction-2l")
    drawn = {token for seed in range(40) for token in prompts.copied(model, 60, seed)[1:]}
    assert drawn == set(range(64))


def test_copied_prompts_that_do_not_fit_are_refused():
    expected = r"2 × 64 tokens has 129; text-lm-3l takes 128: length must be 1 to 63"
    with pytest.raises(LensError, match=expected):
        prompts.copied(lens.load(), 64)
    with pytest.raises(LensError, match="has no vocabulary, so no tokens can be drawn"):
        prompts.copied(lens.load(build("vit")), 5)


def test_losses_of_copied_prompts():
    model = lens.load("induction-2l")
    losses = torch.stack(
        [prompts.token_losses(model, prompts.copied(model, 25, s)) for s in range(8)]
    )
    assert losses[:, :25].mean() == pytest.approx(4.161, abs=0.1)
    assert losses[:, 26:].mean() == pytest.approx(0.142, abs=0.08)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_losses_in_pieces_equal_the_whole(name, monkeypatch):
    model = lens.load(build(name))
    ids = torch.randint(3, 97, (61,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    whole = prompts.token_losses(model, ids)
    monkeypatch.setattr(prompts, "_CHUNK", 97 * 7)
    pieces = prompts.token_losses(model, ids)
    assert torch.allclose(whole, expected, atol=1e-5)
    assert torch.allclose(pieces, expected, atol=1e-5)
    assert prompts.loss(model, ids) == pytest.approx(float(expected.mean()), abs=1e-5)


def test_the_loss_of_a_text_is_that_of_its_tokens():
    model, text = lens.load("text-lm-3l"), "It was the best of times"
    assert prompts.loss(model, text) == prompts.loss(model, model.encode(text))


def test_a_head_that_does_more_is_refused_in_pieces(monkeypatch):
    config = transformers.CohereConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=6,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = lens.load(transformers.CohereForCausalLM(config).eval())
    ids = list(range(3, 40))
    assert prompts.loss(model, ids) > 0
    monkeypatch.setattr(prompts, "_CHUNK", 97 * 7)
    with pytest.raises(LensError, match=r"does more to its logits .* use fewer than 7 tokens"):
        prompts.loss(model, ids)


def test_models_without_a_next_token_have_no_loss():
    with pytest.raises(LensError, match="BertModel has no next-token loss: its tokens see later"):
        prompts.loss(lens.load(build("bert")), [3, 4, 5])
    with pytest.raises(
        LensError, match="LlamaModel has no next-token loss: it has no language-model"
    ):
        prompts.loss(lens.load(build("llama").model), [3, 4, 5])
    with pytest.raises(LensError, match="the prompt has 129 tokens and text-lm-3l takes 128"):
        prompts.loss(lens.load(), [5] * 129)
