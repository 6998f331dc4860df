"""Labels of an alignment in words: the tokens that spell them, however a tokenizer cuts them up."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import lens
from lens.traces.alignment import alignment
from lens.traces.alignment_labels import _moments, places_of

SENTENCEPIECE = ["<pad>", " Das", " klein", "e", " Haus", ",", " das", " da", " steht", ".", "</s>"]


@pytest.mark.parametrize(
    ("tokens", "word", "places"),
    [
        (SENTENCEPIECE, "kleine", [2, 3]),
        (SENTENCEPIECE, " Haus", [4]),
        (SENTENCEPIECE, "das", [6]),
        (SENTENCEPIECE, "kleine Haus", [2, 3, 4]),
        (SENTENCEPIECE, "da steht", [7, 8]),
        (["[CLS]", "the", "bar", "##rel", "##s", "."], "barrels", [2, 3, 4]),
        (["[CLS]", "the", "bar", "##rel", "##s", "."], "the", [1]),
        (["<s>", "hou", "se", "keeper", "s"], "house", [1, 2]),
        ([" 这是", "我", "的", "房", "子", "。"], "房子", [3, 4]),
        (["<|en|>", " ship", " carried", "."], "ship", [1]),
        ([" रामायण", " राम", " की", " कथा"], "राम", [1]),
        ([" cafe\u0301", " cafe"], "cafe", [1]),
        ([" មាន", "ផ្ទះ", "តូច"], "ផ្ទះ", [1]),
        ([" l'", "eau"], "eau", [1]),
    ],
)
def test_the_tokens_of_a_word_are_found(tokens, word, places):
    assert places_of(tokens, word, "source") == places


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "Hau",
            "the source has no word 'Hau'; it reads '<pad> Das kleine Haus, das da steht.</s>'",
        ),
        ("", "the source has no word ''"),
        ("राम", "the source has no word 'राम'; it reads 'यह रामायण'"),
        ("ताब", "the source has no word 'ताब'; it reads 'किताब'"),
        ("s", "the source has no word 's'"),
        ("a", "the source has 'a' 2 times, at the positions 1, 3; give numbers"),
    ],
)
def test_a_word_that_is_not_one_place_is_refused(word, said):
    tokens = [" x", " a", " y", " a"] if "times" in said else SENTENCEPIECE
    if "reads 'यह" in said or "reads 'कि" in said:
        tokens = [" यह", " रामायण"] if word == "राम" else [" किताब"]
    with pytest.raises(lens.LensError) as error:
        places_of(tokens, word, "source")
    assert str(error.value).startswith(said)


@pytest.fixture(scope="module")
def translator():
    """A T5 of random weights whose tokenizer cuts words into letters, but for `haus` and `see`."""
    letters = "▁abcdefghijklmnopqrstuvwxyz."
    merges = [("h", "a"), ("ha", "u"), ("hau", "s"), ("s", "e"), ("se", "e")]
    names = ["<pad>", "</s>", *letters, *(a + b for a, b in merges)]
    words = Tokenizer(BPE(dict(zip(names, range(len(names)), strict=True)), merges))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", add_prefix_space=True
    )
    config = transformers.T5Config(
        vocab_size=len(names), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    return lens.load(model, tokenizer=tokenizer)


def test_words_stand_for_all_their_tokens(translator):
    pair = "das haus am see.", "the sea house."
    trace = lens.capture(translator, pair, keep_qk=True, progress=False).cross
    found = alignment(trace, {"house": "haus", "sea": ["see", "am"]}, at="predicted")
    target, source = trace.query_tokens, trace.tokens
    assert target[6:8] + target[9:13] == ["se", "a", "h", "o", "u", "se"]
    assert (source[5], source[7:9], source[10]) == ("haus", ["a", "m"], "see")
    numbers = dict.fromkeys(range(9, 13), 5) | {place: [10, 7, 8] for place in (6, 7)}
    by_number = alignment(trace, numbers, at="predicted")
    assert found.table().equals(by_number.table())
    assert found.findings() == by_number.findings()
    assert "a key at random in" in found.findings()[0]
    with pytest.raises(lens.LensError, match="the target has no word 'haus'; it reads"):
        alignment(trace, {"haus": "haus"})
    with pytest.raises(lens.LensError, match="the source has no word 'sea'"):
        alignment(trace, [("sea", "sea")])
    with pytest.raises(lens.LensError, match=r"in whole numbers or words, got \(1, 1.5\)"):
        alignment(trace, {1: 1.5})  # pyright: ignore[reportArgumentType]


def test_words_of_a_sound_stand_for_seconds():
    from .encoder_decoders import inputs_of, made

    sound = lens.capture(lens.load(made("whisper")), inputs_of("whisper"), progress=False)
    by_word = alignment(sound, {"30": (0.05, 0.09), "32": (0.1, 0.2)}, at="predicted")
    by_number = alignment(sound, {1: (0.05, 0.09), 3: (0.1, 0.2)}, at="predicted")
    assert by_word.table().equals(by_number.table())


@pytest.mark.parametrize(
    ("span", "keys"),
    [
        ((0.0, 0.1), [0]),  # not the key that begins where it ends
        ((0.0, 0.11), [0, 1]),
        ((0.3, 0.4), [3]),  # 0.3 / 0.1 is below 3
        ((0.25, 0.25), [2]),
        ((0.5, 1.0), [5, 6, 7, 8, 9]),  # to the end of the sound
        ((0.5, 1.05), [5, 6, 7, 8, 9]),  # of which the last key lacks less than a key
        ((0.0, 1.2), list(range(12))),  # and what is no sound any more is refused
    ],
)
def test_seconds_stand_for_the_keys_that_they_share_time_with(span, keys):
    assert _moments(np.array(span), 0.1, 10).tolist() == keys
