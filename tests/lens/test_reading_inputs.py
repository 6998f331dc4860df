"""Arguments of lens.reading that are none: refused in one line, before the model runs."""

from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.stats import over_rows


@pytest.fixture(scope="module")
def small():
    return lens.load("induction-2l")


@pytest.fixture(scope="module")
def prompts(small):
    return [lens.tasks.copied(small, 6, seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("explain_pairs", {"pairs": None}, "pairs must be a list, got None"),
        ("explain_pairs", {"pairs": [[(8, 3, 1)]] * 3}, r"\(query, key\), both whole numbers"),
        ("explain_pairs", {"pairs": [[(8, 3, 2, 1)]] * 3}, r"\(query, key\), both whole numbers"),
        ("explain_pairs", {"pairs": [[8, 3]] * 3}, r"\(query, key\), both whole numbers"),
        ("explain_pairs", {"pairs": [[(8.5, 3)]] * 3}, r"\(query, key\), both whole numbers"),
        ("explain_pairs", {"pairs": [[(True, False)]] * 3}, r"\(query, key\), both whole numbers"),
        ("explain_pairs", {"pairs": [None] * 3}, r"\(query, key\), both whole numbers, got None"),
        ("explain_pairs", {"pairs": [[(8, 3), (8,)]] * 3}, r"\(query, key\), both whole numbers"),
        ("explain_pairs", {"by": 1}, "by must be a list, got 1"),
        ("explain_pairs", {"by": [None] * 3}, r"by\[0\] must be a list, got None"),
        ("explain_pairs", {"by": {"a": 1}}, "by must be a list"),
        ("explain_pairs", {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ("removal", {"parts": "L0H1"}, "parts must be a list, got 'L0H1'"),
        ("removal", {"parts": []}, "parts names no writer"),
        ("removal", {"seed": 1.5}, "seed must be"),
        ("components", {"distance": True}, "distance must be an integer of at least 0, got True"),
        ("components", {"seed": "a"}, "seed must be"),
        ("subspace", {"rank": 0}, "rank must be a positive integer, got 0"),
        ("subspace", {"rank": 1.5}, "rank must be a positive integer, got 1.5"),
        ("subspace", {"pairs": [[(8, 3)]] * 3}, "pairs must be one of 'induction'"),
        ("subspace", {"beside": None}, "beside must be one of 'induction'"),
        ("subspace", {"seed": -1}, "seed must be"),
    ],
)
def test_what_no_pairs_of_a_head_are_is_refused(small, prompts, name, options, message):
    with pytest.raises(LensError, match=message):
        getattr(lens.reading, name)(small, prompts, "L1H0", progress=False, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("faithfulness", {"methods": "raw"}, "methods must be a list, got 'raw'"),
        ("faithfulness", {"methods": 5}, "methods must be a list, got 5"),
        ("faithfulness", {"shares": 0.5}, "shares must be a list, got 0.5"),
        ("faithfulness", {"shares": ("a",)}, "shares must lie between 0 and 1"),
        ("faithfulness", {"seed": -1}, "seed must be"),
        ("perturb", {"heads": "L1H0"}, "heads must be a list, got 'L1H0'"),
        ("perturb", {"heads": []}, "heads names none"),
        ("perturb", {"sizes": (True,)}, "sizes must be positive numbers"),
        ("perturb", {"sizes": None}, "sizes must be a list, got None"),
        ("perturb", {"seed": "a"}, "seed must be"),
        ("retrieval", {"masked": 2}, "masked must be a list, got 2"),
        ("retrieval", {"seed": -1}, "seed must be"),
    ],
)
def test_what_no_judgement_is_made_of_is_refused(small, prompts, name, options, message):
    with pytest.raises(LensError, match=message):
        getattr(lens.reading, name)(small, prompts, progress=False, **options)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        *(
            (given, f"answer must be an integer of at least 0, got {given}")
            for given in (True, 1.5, -1)
        ),
        ("a", "answer must be an integer, got 'a'"),
    ],
)
def test_an_answer_is_a_token(small, prompts, answer, message):
    with pytest.raises(LensError, match=message):
        lens.reading.attribute(small, prompts[0], "raw", answer=answer)


def test_a_method_a_part_or_a_head_that_is_named_twice_counts_once(small, prompts):
    quiet: dict[str, Any] = {"progress": False}
    found = lens.reading.faithfulness(small, prompts[0], ["raw", "raw"], draws=1, **quiet)
    assert found.table()["method"].tolist() == ["raw", "random"]
    assert found.findings()
    left = lens.reading.removal(small, prompts, "L1H0", parts=["L0H1", "L0H1"], **quiet)
    assert left.table()["part"].tolist() == ["L0H1"]
    changed = lens.reading.perturb(
        small, prompts[0], ["L1H0", (1, 0)], sizes=[1.0], draws=1, **quiet
    )
    assert changed.table()["name"].tolist() == ["L1H0"]


def test_places_of_numpy_are_places(small, prompts):
    quiet: dict[str, Any] = {"progress": False}
    query: Any = np.int64(8)
    key: Any = np.int64(3)
    one = lens.reading.explain(small, prompts[0], "L1H0", query, key, **quiet)
    assert one.logit == lens.reading.explain(small, prompts[0], "L1H0", 8, 3, **quiet).logit
    arrays = [np.array([(8, 3)])] * 2 + [torch.tensor([(8, 3)])]
    lists = [[(8, 3)]] * 3
    found = [
        lens.reading.explain_pairs(small, prompts, "L1H0", some, **quiet)
        for some in (arrays, lists)
    ]
    assert found[0].table().equals(found[1].table())


def test_answers_are_not_explained_on_pictures():
    vit = lens.load("vit-digits")
    picture = np.zeros((28, 28, 3), np.uint8)
    for judged in (lens.reading.faithfulness, lens.reading.perturb):
        with pytest.raises(LensError, match="prompts of tokens, and this is none"):
            judged(vit, [picture], progress=False)


def test_a_seed_is_a_whole_number():
    with pytest.raises(LensError, match="seed must be an integer of at least 0, got -1"):
        over_rows(np.ones((3, 4)), seed=-1)
