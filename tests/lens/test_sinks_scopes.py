"""Each scope is the effect of its heads alone."""

import pytest
import torch

import lens
from lens.errors import LensError
from lens.sinks import by_scope
from tests.lens.architectures import build

IDS = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(5))


def test_each_scope_edits_what_it_says():
    model = lens.load(build("llama"))
    result = by_scope(model, IDS, head="L1H4", edit="drop", seed=3)
    table = result.table().set_index(["reach", "condition"])
    assert [found.scope for found in result.effects.values()] == [
        "L1H4", "layer 1", "layers 1 to 2", "all heads",
    ]  # fmt: skip
    expected = lens.sinks.effect(model, IDS, layers=[1, 2], edit="drop", seed=3).table()
    for name in ("delta_loss", "kl", "mass"):
        found = table.loc["from_layer"][name].to_numpy()
        assert found == pytest.approx(expected[name].to_numpy(), abs=1e-12)
    assert len(result.findings()) == 6
    assert "of layers 1 to 2 changes the loss" in result.findings()[2]


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(LensError, match="there is no L3H0: layer must be 0 to 2, got 3"):
        by_scope(lens.load(build("llama")), IDS, head="L3H0")
