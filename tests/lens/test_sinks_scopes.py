"""Each scope is the effect of its heads alone."""

import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.edits import Drop, Mask
from lens.sinks import bos_pair, by_bos, by_scope
from tests.lens.architectures import build

IDS = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(5))


def test_each_scope_edits_what_it_says():
    model = lens.load(build("llama"))
    result = by_scope(model, IDS, head="L1H4", edit=Drop("first"), seed=3)
    table = result.table().set_index(["reach", "condition"])
    assert [found.scope for found in result.effects.values()] == [
        "L1H4", "layer 1", "layers 1 to 2", "all heads",
    ]  # fmt: skip
    expected = lens.effect(model, IDS, Drop("first", layers=[1, 2]), seed=3).table()
    for name in ("delta_loss", "kl", "mass"):
        found = table.loc["from_layer"][name].to_numpy()
        assert found == pytest.approx(expected[name].to_numpy(), abs=1e-12)
    assert len(result.findings()) == 6
    assert (
        "from_layer: Edit Drop first (amount 1) of layers 1 to 2 changes the loss"
        in result.findings()[2]
    )


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(LensError, match="there is no L3H0: layer must be 0 to 2, got 3"):
        by_scope(lens.load(build("llama")), IDS, head="L3H0")


def test_with_and_without_bos_are_run_in_one_call():
    model = lens.load("induction-2l")
    bos = model.bos_id
    text = lens.tasks.copied(model, 13, 2)
    assert text[0] == bos
    pair = bos_pair(model, [text])
    assert pair == {"with BOS": [text[:-1]], "without BOS": [text[1:]]}
    assert bos_pair(model, [text[1:]]) == pair
    table = by_bos(model, [text, text], controls=()).table().set_index("reach")
    assert table["bos"].to_dict() == {"with BOS": "added", "without BOS": "absent"}
    expected = lens.effect(model, [text[1:]], Mask(), controls=()).values["edit"]["delta_loss"]
    assert table.loc["without BOS", "delta_loss"] == pytest.approx(expected[0, 0], abs=1e-6)


def test_pairs_without_a_bos_or_text_are_refused():
    with pytest.raises(LensError, match="has no BOS token, so there is no pair"):
        bos_pair(lens.load(build("gpt2")), IDS)
    model = lens.load("induction-2l")
    with pytest.raises(LensError, match="at least two tokens behind the BOS"):
        bos_pair(model, [[model.bos_id, 5]])
