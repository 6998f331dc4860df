"""The same text with BOS in front and without."""

import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.edits import Mask
from lens.sinks.detection.conditions import bos_pair
from tests.lens.architectures import build

IDS = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(5))


def test_with_and_without_bos():
    model = lens.load("induction-2l")
    bos = model.bos_id
    text = lens.tasks.copied(model, 13, 2)
    assert text[0] == bos
    pair = bos_pair(model, [text])
    assert pair == {"with BOS": [text[:-1]], "without BOS": [text[1:]]}
    assert bos_pair(model, [text[1:]]) == pair
    found = {name: lens.effect(model, ids, Mask(), controls=()) for name, ids in pair.items()}
    assert {name: one.bos for name, one in found.items()} == {
        "with BOS": "added",
        "without BOS": "absent",
    }


def test_pairs_without_a_bos_or_text_are_refused():
    with pytest.raises(LensError, match="has no BOS token, so there is no pair"):
        bos_pair(lens.load(build("gpt2")), IDS)
    model = lens.load("induction-2l")
    with pytest.raises(LensError, match="at least two tokens behind the BOS"):
        bos_pair(model, [[model.bos_id, 5]])
