"""Scores of blocks: those of tokens summed, or said to be approximate, and no map of all queries and keys."""

import dataclasses

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.reading.attributing import METHODS
from lens.reading.judged import APPROXIMATE
from tests.lens.layouts import layout_model, modules_named
from tests.lens.test_reading_explain import Largest


def prompt(length=14):
    return torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "bert"])
def test_blocks_of_one_token_are_tokens_and_larger_ones_sum_them(kind):
    """Groups, learned sinks with a window, and a model that looks ahead."""
    model = lens.load(layout_model(kind))
    methods = (
        METHODS
        if kind == "llama"
        else ("effective", "rollout", "gradient_attention", "gradient_rollout")
    )
    for method in methods:
        own = lens.reading.attribute(model, prompt(), method).numpy()
        scale = np.abs(own).max()
        one = lens.reading.attribute_blocks(model, prompt(), method, block=1)
        np.testing.assert_allclose(one.values, own, atol=2e-5 * scale, err_msg=method)
        assert not one.approximate
        some = lens.reading.attribute_blocks(model, prompt(), method, block=4)
        assert some.approximate == (method in APPROXIMATE)
        summed = np.add.reduceat(own, [0, 4, 8, 12])
        if method not in (*APPROXIMATE, "leave_one_out"):
            np.testing.assert_allclose(some.values, summed, atol=2e-5 * scale * 4, err_msg=method)
        elif method != "flow":
            assert np.abs(some.values - summed).max() > 1e-3 * scale


def test_maps_of_blocks_are_exact_where_attention_is_even():
    root = layout_model("bert")
    with torch.no_grad():
        for part in modules_named(root, "query"):
            part.weight.zero_()
            part.bias.zero_()
    model = lens.load(root)
    own = lens.reading.attribute(model, prompt(), "rollout").numpy()
    found = lens.reading.attribute_blocks(model, prompt(), "rollout", block=4)
    np.testing.assert_allclose(found.values, np.add.reduceat(own, [0, 4, 8, 12]), atol=1e-6)
    assert found.values.sum() == pytest.approx(1)


@pytest.mark.parametrize("method", ["rollout", "gradient_rollout", "gradient_attention", "attnlrp"])
def test_a_long_prompt_needs_no_map_of_all_queries_and_keys(method):
    model = lens.load(layout_model("llama", max_position_embeddings=1024))
    length = 600
    with Largest() as largest:
        found = lens.reading.attribute_blocks(model, prompt(length), method, block=40)
    assert largest.most < length * length / 2
    assert len(found.values) == 15
    if method == "rollout":
        assert found.values.sum() == pytest.approx(1)
    with pytest.raises(LensError, match=r"600 tokens; .* score blocks of tokens \(block=64\)"):
        lens.reading.attribute(model, prompt(length), method)


def test_judged_in_blocks():
    """A block that holds what is copied is found; all methods stand beside random order, and say what they are."""
    model = lens.load("induction-2l")
    ids = lens.tasks.copied(model, 12)
    asked = ["raw", "rollout", "leave_one_out"]
    found = lens.reading.faithfulness(
        model, ids, asked, draws=4, block=5, shares=(0.2, 0.6), progress=False
    )
    table = found.table().set_index("method")
    assert table.loc["leave_one_out", "sufficiency"] == table["sufficiency"].min()
    said = [one for one in found.findings() if one.kind == "limit"]
    assert "Blocks of 5 tokens" in said[0]
    assert "block means: rollout" in said[0]
    exact = dataclasses.replace(found, block=1).findings()  # of one token a map is that of tokens
    assert any(one.endswith("block means: none.") for one in exact)
    deleted = found.comprehensiveness[asked.index("leave_one_out"), 0, 0]
    scores = lens.reading.attribute_blocks(model, ids, "leave_one_out", block=5, progress=False)
    assert deleted == pytest.approx(scores.values.max())  # one block of five is a fifth
    assert list(scores.plot().data[0].y) == scores.values.tolist()
    assert scores.table()["first"].tolist() == [0, 5, 10, 15, 20]
    assert [one.kind for one in scores.findings()] == ["best", "limit"]


def test_what_is_no_block_is_refused():
    model = lens.load(layout_model("llama"))
    with pytest.raises(LensError, match="block must be a positive integer, got 0"):
        lens.reading.attribute_blocks(model, prompt(), "raw", block=0)
    with pytest.raises(LensError, match=r"block must be a positive integer, got 1\.5"):
        lens.reading.faithfulness(model, prompt(), ["raw"], block=1.5)
    with pytest.raises(LensError, match="method must be one of 'raw'"):
        lens.reading.attribute_blocks(model, prompt(), "attention")
