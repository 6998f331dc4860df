"""Sentences know what they speak of, and are strings wherever one is wanted."""

import copy
import json

from lens.common.results import Sentence, of_kind


def test_a_sentence_is_a_string_with_a_kind():
    said = Sentence("Of 18 heads 4 have a sink.", kind="rate")
    assert said == "Of 18 heads 4 have a sink."
    assert json.loads(json.dumps([said])) == ["Of 18 heads 4 have a sink."]
    assert type(said.text) is str
    again = copy.deepcopy(said)
    assert (again.kind, again.text) == ("rate", said.text)


def test_sentences_are_picked_by_kind_not_by_place_or_words():
    said = [Sentence("limit", kind="effect"), Sentence("b", kind="limit"), Sentence("c", kind="x")]
    assert of_kind(said, "limit") == ("b",)
    assert of_kind(said, "x", "effect") == ("limit", "c")
    assert of_kind(said, "none") == ()
