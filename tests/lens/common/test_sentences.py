"""Sentences know what they speak of, and are strings wherever one is wanted."""

import copy
import json
import math

from lens.common.results import Sentence, ends, if_known, of_kind, with_ends, written


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


def test_what_rounds_to_nothing_has_no_minus():
    assert written(-0.004, ".2f") == written(-0.004, "z.2f") == "0.00"
    assert (written(-0.0004, "+.1%"), written(-0.4, "+.3g"), written(0.4, " .1f")) == (
        "+0.0%",
        "-0.4",
        " 0.4",
    )
    assert ends(-0.001, 0.001, ".2f") == " [0.00, 0.00]"
    assert if_known(-0.0001) == "0.0%"
    row = {"drop": -0.001, "drop_low": -0.2, "drop_high": 0.001}
    assert with_ends(row, "drop", ".2f") == "0.00 [-0.20, 0.00]"
