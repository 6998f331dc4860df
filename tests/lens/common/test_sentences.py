"""Sentences know what they speak of, and are strings wherever one is wanted."""

import copy
import json
import math

from lens.common.results import Sentence, ends, of_kind


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


def test_an_interval_stands_behind_a_number_where_both_ends_are_known():
    assert ends(0.5, 1.25) == " [0.5, 1.25]"
    assert ends(-0.5, 1, "+.2f") == " [-0.50, +1.00]"
    assert ends(math.nan, 1.0) == ends(0.5, math.nan) == ends(math.nan, math.nan) == ""
