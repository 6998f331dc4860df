"""Masked language models are asked for masked tokens, never for the next one."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import lens
from lens.common.errors import LensError
from lens.tasks import induction, language_modelling

MASK = 6


class Tokenizer:
    """As much of one as tasks of token ids need."""

    bos_token_id = None
    mask_token_id = MASK
    all_special_ids = (0, 4, 5, 6)

    def convert_ids_to_tokens(self, ids):
        return [f"t{index}" for index in ids]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens)


SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def masked():
    torch.manual_seed(0)
    config = BertConfig(**SIZES, initializer_range=0.2)  # edits then do more than rounding does
    return lens.load(BertForMaskedLM(config).eval(), tokenizer=Tokenizer())


def test_windows_have_masked_tokens_as_answers(masked):
    windows = torch.randint(7, 101, (3, 22), generator=torch.Generator().manual_seed(1))
    windows[:, 0], windows[:, -1] = 4, 5
    task = language_modelling(masked, windows.tolist())
    assert (task.name, task.positions.shape) == ("masked tokens", (3, 3))  # 15 % of 20
    for row in range(3):
        at = task.positions[row]
        assert (task.clean[row, at] == MASK).all()
        assert (task.correct[row] == windows[row, at]).all()
        assert int((task.clean[row] != windows[row]).sum()) == 3
        assert {0, 21}.isdisjoint(at.tolist())
    logits = masked.model(task.clean).logits
    rows = torch.arange(3)[:, None]
    expected = -logits.log_softmax(-1)[rows, task.positions, task.correct].mean(1)
    torch.testing.assert_close(task.evaluate(masked), expected.detach())


def test_copies_are_asked_for_in_the_second_one(masked):
    task = induction(masked, n=4, length=20)
    assert (task.positions >= 20).all()
    assert (task.clean.gather(1, task.positions - 20) == task.correct).all()
    assert task.corrupt is not None
    assert (task.corrupt[:, 20:] == task.clean[:, 20:]).all()
    assert (task.corrupt[:, :20] != task.clean[:, :20]).any(1).all()


def test_a_masked_model_without_a_mask_token_is_refused(masked):
    with pytest.raises(LensError, match="its tokenizer has no mask token"):
        induction(replace(masked, tokenizer=None), n=2, length=5)


def test_effects_are_measured_on_the_masked_tokens(masked):
    """Without key 0 in every row is the model's own run with that key padded."""
    task = induction(masked, n=3, length=20)
    found = lens.effect(masked, task, lens.edits.Mask("first"), controls=(), progress=False)
    assert found.per == "answer"
    hidden = torch.ones_like(task.clean)
    hidden[:, 0] = 0
    with torch.no_grad():
        before = masked.model(task.clean).logits
        after = masked.model(task.clean, attention_mask=hidden).logits
    rows = torch.arange(3)[:, None]
    base, edited = (one.log_softmax(-1)[rows, task.positions] for one in (before, after))
    loss = (base - edited).gather(-1, task.correct[..., None]).mean((1, 2))
    values = {name: one[0] for name, one in found.values["edit"].items()}
    assert values["delta_loss"] == pytest.approx(loss.numpy(), rel=1e-4, abs=1e-6)
    kl = (base.exp() * (base - edited)).sum(-1).mean(1)
    assert values["kl"] == pytest.approx(kl.numpy(), rel=1e-3, abs=1e-7)
    gain = task.sign * (task.measure(after, torch.arange(3)) - task.evaluate(masked))
    assert values["gain"] == pytest.approx(gain.numpy(), rel=1e-4, abs=1e-6)


def test_effects_on_next_tokens_are_refused(masked):
    task = induction(masked, n=2, length=20)
    with pytest.raises(LensError, match="fills in masked tokens and predicts no next token; give"):
        lens.effect(masked, task.clean, lens.edits.Mask("first"), progress=False)
    with pytest.raises(LensError, match="BertForMaskedLM predicts none; leave it out"):
        lens.effect(masked, task, lens.edits.Mask("first"), scored=[3], progress=False)


@pytest.mark.parametrize("kind", ["bert", "xlnet", "choice"])
def test_a_model_that_has_read_the_next_token_is_not_asked_for_it(kind):
    network = {
        "bert": lambda: BertLMHeadModel(BertConfig(**SIZES)),
        "xlnet": lambda: XLNetLMHeadModel(
            XLNetConfig(vocab_size=101, d_model=32, n_layer=2, n_head=4, d_inner=48)
        ),
        "choice": lambda: BertForMultipleChoice(BertConfig(**SIZES)),
    }[kind]()
    model = lens.load(network.eval())
    assert model.info.sees_later
    for make in (lambda: language_modelling(model, [[7, 8, 9]]), lambda: induction(model, n=2)):
        with pytest.raises(LensError, match="a next token was read before it is predicted"):
            make()
    with pytest.raises(LensError, match="no next-token loss: its tokens see later ones"):
        lens.tasks.loss(model, [7, 8, 9])
    decoder = lens.load(BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval())
    ids = torch.tensor([[7, 8, 9, 11]])
    with torch.no_grad():
        own = torch.nn.functional.cross_entropy(decoder.model(ids).logits[0, :-1], ids[0, 1:])
    task = language_modelling(decoder, ids.tolist())
    assert task.evaluate(decoder)[0] == pytest.approx(float(own))


def test_answers_that_are_no_next_tokens_are_asked_of_a_model_that_sees_them():
    known = lens.circuits.known.tracr("reverse")
    assert known.model.info.sees_later
    for task in known.tasks.values():
        task.check(known.model)
