"""Titles of figures say of the highest of many what the result's sentence says: one value with one interval."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lens.circuits.patches.effects import PatchEffects
from lens.common.head_ids import HeadId
from lens.figures.columns import column_grid
from lens.figures.heads import head_grid
from lens.heads.behaviour.retrieval import RetrievalScores
from lens.heads.likeness.head_similarity import HeadSimilarity
from lens.heads.measures.scores import HeadScores, Intervention
from lens.heads.pruning.sublayer_scores import BlockInfluence, SkipSweep
from lens.traces.profiles import COLUMNS

RANDOM = np.random.default_rng(0)
NAMES = ("L0.attention", "L0.mlp", "L1.attention", "L1.mlp")


def similarity() -> HeadSimilarity:
    sums = RANDOM.random((4, 3, 3)) / 4
    heads = tuple(HeadId(0, head) for head in range(3))
    return HeadSimilarity(
        sums + sums.transpose(0, 2, 1), np.ones((4, 3, 3)), "js", False, "exact", heads, "m"
    )


def patched() -> PatchEffects:
    base, source = np.ones(5), np.zeros(5)
    moved = 1 - RANDOM.random((3, 1, 5))
    names = ("a0.h0", "a0.h1", "m0")
    return PatchEffects(names, ("7",), moved, base, source, "noising", (), "loss", "made", "small")


MADE: dict[str, Callable[[], Any]] = {
    "importance": lambda: HeadScores(
        RANDOM.random((2, 3, 6)) + 1, np.ones(6), "ablation", Intervention("mean"), "loss", -1, "made", "m"
    ),
    "retrieval": lambda: RetrievalScores(RANDOM.random((2, 3, 5)), np.ones(5), 0.5, "m"),
    "similarity": similarity,
    "sweep": lambda: SkipSweep(
        NAMES, RANDOM.random((4, 6)) + 1, RANDOM.random((4, 6)), np.ones(6), "js", "loss", "made", "m"
    ),
    "influence": lambda: BlockInfluence(RANDOM.random((3, 6)), "made", "m"),
    "patches": patched,
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_the_title_has_the_interval_of_the_sentence(name):
    found = MADE[name]()
    (told,) = re.findall(r"[-+.\d]+ \[[^]]+\]", found.plot().layout.title.text)
    assert told in found.findings()[0]


def test_tables_of_heads_are_titled_with_the_interval_of_the_highest_where_they_have_one():
    table = pd.DataFrame({"layer": [0, 0, 2], "head": [0, 1, 0], "worth": [0.5, 0.2, 0.1]})
    assert column_grid(table, "worth").layout.title.text == "worth: highest at L0H0, 0.5"  # type: ignore[attr-defined]
    table = table.assign(worth_low=table["worth"] - 0.1, worth_high=table["worth"] + 0.1, n=3)
    title = column_grid(table, "worth").layout.title.text  # type: ignore[attr-defined]
    assert title == "worth: highest at L0H0, 0.5 [0.322, 0.678]"
    rows = table.rename(columns={"worth": "value", "worth_low": "low", "worth_high": "high"})
    rows = rows.assign(metric="induction", variant="raw", detail="", prompt_id="text")
    title = head_grid(rows.reindex(columns=list(COLUMNS)), "induction").layout.title.text  # type: ignore[attr-defined]
    assert title == "Induction (probability): highest at L0H0, 0.5 [0.322, 0.678]"
