"""Differential attention: the matrix is the definition's, and DiffLlama's own output comes of it."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from tests.lens.hybrids import hybrid

IDS = [3, 7, 1, 9, 4, 4, 8, 2, 6, 5, 1]


def test_phi_is_the_difference_of_both_maps_of_the_trace():
    model = lens.load(hybrid("diffllama"))
    found = lens.mixers.capture(model, IDS, block=4, progress=False)
    assert found.layers == (0, 1, 2, 3)
    assert max(one.check for one in found.measures) < 1e-5  # against what the layer gives its norm
    trace = lens.capture(model, IDS, block_size=1, progress=False)
    pairs = trace.heads // 2
    for layer in found.layers:
        attention = model.model.model.layers[layer].self_attn
        with torch.no_grad():
            first = (attention.lambda_q1 * attention.lambda_k1).sum().exp()
            second = (attention.lambda_q2 * attention.lambda_k2).sum().exp()
        factor = float(first - second) + attention.lambda_init
        maps = np.nan_to_num(trace.block_mass.sel(layer=layer).values)
        tile = found.phi(layer).tile((2, 11), (0, 7)).numpy()
        expected = maps[:pairs] - factor * maps[pairs:]
        np.testing.assert_allclose(tile, expected[:, 2:11, :7], atol=1e-5)
    table = found.table(trace)
    assert set(table["mixer"]) == {"differential", "softmax"}
    assert (table.query("mixer == 'differential'")["negative_share"] > 0).all()


def test_shapes_that_do_not_fit_are_refused():
    query = torch.zeros(2, 3, 5, 4)
    with pytest.raises(LensError, match=r"value \[heads, tokens, value_dim\], got .*\[3, 6, 8\]"):
        lens.mixers.differential(query, query, torch.zeros(3, 6, 8), torch.ones(3), 1.0)
