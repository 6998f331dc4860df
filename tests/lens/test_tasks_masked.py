"""Masked language models are asked for masked tokens, never for the next one."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

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


@pytest.fixture(scope="module")
def masked():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
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
