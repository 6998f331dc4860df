"""Kept blocks and exact masses of one prompt."""

from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens import policies
from lens.figures.policies import policy_heads


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


def test_maps_are_the_models_own_attention_and_the_policies_choice(model):
    ids = model.encode(lens.tasks.text("lily"))[:44]
    near = policies.AShape(2, 8)
    found = policies.maps(model, ids, [near, policies.Full()], block_size=8)
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        p = model.model(torch.tensor([ids]), output_attentions=True).attentions
    model.model.set_attn_implementation("sdpa")
    p = torch.cat(p).double().numpy()
    table = found.table()
    assert len(table) == 18 * 21
    for row in table.sample(30, random_state=0).to_dict("records"):
        rows = slice(row["query_block"] * 8, min(row["query_block"] * 8 + 8, 44))
        keys = slice(row["key_block"] * 8, row["key_block"] * 8 + 8)
        mass = p[row["layer"], row["head"], rows, keys].sum(-1).mean()
        assert row["mass"] == pytest.approx(mass, abs=1e-5)
        is_near = row["key_block"] == 0 or row["query_block"] - row["key_block"] <= 1
        assert row["kept"] == 2 + is_near
    masses, kept = found.of("L1H3", str(near))
    assert np.isnan(masses[0, 1])
    assert np.nansum(masses, 1) == pytest.approx(1, abs=1e-5)
    assert kept.sum() == 6 + 5 + 4
    figure: Any = found.plot("L1H3", str(near))
    assert np.isnan(figure.data[1].z).sum() == 36 - (21 - 15)
    recall = np.where(kept, masses, 0).sum(1).mean()
    assert f"71.4% of the blocks, {recall:.1%}" in figure.layout.title.text


def test_heads_by_policies_are_the_numbers_of_the_table(model):
    ids = model.encode(lens.tasks.text("lily"))[:32]
    offered = [policies.AShape(2, 8), policies.AShape(2, 16), policies.Full()]
    table = policies.evaluate(model, [ids], offered, block_size=8).table()
    figure: Any = policy_heads(table, "recall")
    assert list(figure.data[0].y) == [f"L{a}H{b}" for a in range(3) for b in range(6)]
    assert list(figure.data[0].x) == ["AShape(first=2, last=8)", "AShape(first=2, last=16)", "Full"]
    own = table[(table["name"] == "L2H1") & (table["policy"] == "AShape(first=2, last=16)")]
    assert figure.data[0].z[13][1] == own["recall"].iloc[0]


def test_what_is_not_there_is_refused(model):
    found = policies.maps(model, [1, 2, 3, 4], policies.Full(), block_size=2)
    with pytest.raises(lens.LensError, match="there is no L7H0"):
        found.of("L7H0", "Full()")
    with pytest.raises(lens.LensError, match="policy must be one of Full"):
        found.of("L0H0", "AShape()")
    with pytest.raises(lens.LensError, match="maps are of one prompt, got 2"):
        policies.maps(model, [[1, 2], [3, 4]], policies.Full())
    with pytest.raises(lens.LensError, match="at most 62 policies"):
        policies.maps(model, [1, 2], [policies.Full()] * 63)
