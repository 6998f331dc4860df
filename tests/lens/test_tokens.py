"""How single tokens look, which can be drawn, and a tokenizer that is not the model's own."""

from dataclasses import replace

import pytest

import lens
from lens.common.errors import LensError
from lens.models.tokens import check_fit, is_special, readable
from lens.models.vocabulary import around, ordinary_ids
from lens.traces.alignment_labels import places_of
from lens.traces.token_rows import token_classes


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


class Cut:
    """A tokenizer that knows the first tokens of another one."""

    bos_token_id = None
    all_special_ids = (1,)

    def __init__(self, entries):
        self._entries = entries

    def get_vocab(self):
        return {f"t{index}": index for index in range(self._entries)}

    def convert_ids_to_tokens(self, ids):
        return [f"t{index}" if index < self._entries else None for index in ids]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.mark.parametrize("text", ["中 😀 ש", "naïve café", "Ahab's leg.\n"])
def test_byte_tokens_are_told_apart_and_none_is_lost(model, text):
    """Each byte of a split character stands as itself; the bytes of all tokens are the text's."""
    ids = model.encode(text)[1:]
    strings = model.token_strings(ids)
    assert len(set(strings)) == len(set(ids))
    assert not any("\ufffd" in string for string in strings)
    found = b"".join(
        bytes.fromhex(string.replace("<0x", "").replace(">", ""))
        if string.startswith("<0x")
        else string.encode()
        for string in strings
    )
    assert found.decode() == text


def test_a_token_with_a_whole_and_a_half_character_shows_both(model):
    letters = {byte: letter for letter, byte in _letters().items()}
    half = "".join(letters[byte] for byte in " é中".encode()[:-1])
    assert readable(model.tokenizer, half, 0) == " é<0xE4><0xB8>"
    assert readable(model.tokenizer, "<0xE4>", 0) == "<0xE4>"
    assert readable(model.tokenizer, "<0x0A>", 0) == "\n"


def _letters():
    from lens.models.tokens import _byte_of

    return _byte_of()


def test_ids_that_the_tokenizer_does_not_know_are_shown_and_never_drawn(model):
    padded = replace(model, tokenizer=Cut(model.info.vocab - 7))
    assert padded.token_strings([0, model.info.vocab - 1]) == ["t0", f"<id {model.info.vocab - 1}>"]
    assert ordinary_ids(padded) == [0, *range(2, model.info.vocab - 7)]
    assert max(lens.tasks.copied(padded, 60)) < model.info.vocab - 7


def test_a_tokenizer_of_another_model_is_noticed_when_it_is_loaded(model):
    message = f"the tokenizer of .* has 5 entries and the model {model.info.vocab:,}: it is not"
    with pytest.raises(LensError, match=message):
        lens.load("text-lm-3l", tokenizer=Cut(5))
    with pytest.raises(LensError, match=message):
        lens.load(model.model, tokenizer=Cut(5))
    with pytest.raises(LensError, match="it is not the model's own"):
        check_fit(Cut(2 * model.info.vocab), model.info.vocab, "x")
    for entries in (model.info.vocab, model.info.vocab - 7, model.info.vocab + 3):
        check_fit(Cut(entries), model.info.vocab, "x")
    check_fit(None, model.info.vocab, "x")


def test_what_stands_round_a_text_is_the_tokenizers_own(model):
    assert around(model) == ([model.bos_id], [])
    assert around(lens.load("induction-2l")) == ([64], [])


@pytest.mark.parametrize(
    ("token", "special"),
    [("<s>", 1), (" <|en|>", 1), ("[CLS] ", 1), ("<b><i>", 0), ("a < b > c", 0), ("[1, 2]", 0)],
)
def test_a_special_token_is_one_mark_wherever_it_is_asked(token, special):
    """A row of tags is text: of labels in words it was a mark, of maps of words none."""
    assert is_special(token) == special
    if special:
        with pytest.raises(LensError, match="the source has no word"):
            places_of(["x", f" {token}"], token, "source")
    else:
        assert places_of(["x", f" {token}"], token, "source") == [1]
    row = token_classes([token, "was", " x"])
    assert row == ["first", "word" if special or token.endswith(" ") else "piece", "word"]
