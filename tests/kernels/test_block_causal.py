"""Block-causal masks (frames of a video, blocks that are predicted whole): as the spelled-out mask, without its N × N."""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from lens_kernels import AttentionMask, attention

from tests.kernels.helpers import CUDA

interpreted = pytest.mark.skipif(
    CUDA or not find_spec("triton"), reason="no interpreter: there is a GPU, or no triton"
)
STATISTICS = ("lse", "entropy", "received", "block_mass", "distance")


def seen(bounds, queries, keys, window=None):
    """bool [queries, keys], pair by pair."""
    found = torch.zeros(queries, keys, dtype=torch.bool)
    for query in range(queries):
        place = query + keys - queries
        end = next((b for a, b in pairwise(bounds) if a <= place < b), place + 1)
        for key in range(max(end, place + 1)):
            far = window is not None and abs(place - key) >= window
            found[query, key] = not far
    return found


@pytest.mark.parametrize(
    "backend", ["reference", "torch", "cpu", pytest.param("triton", marks=interpreted)]
)
@pytest.mark.parametrize(
    ("bounds", "queries", "window"),
    [([0, 1, 7, 8, 20], 20, None), ([0, 4, 8, 12], 20, None), ([0, 9, 20], 6, None), ([0, 6, 7, 20], 20, 4)],
)  # fmt: skip
def test_a_query_sees_its_own_block_whole(backend, bounds, queries, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, queries, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    options = {"block_size": 4, "statistics": STATISTICS, "backend": backend}
    found = attention(
        q, k, v, mask=AttentionMask(causal=True, blocks=bounds, window=window), **options
    )
    allowed = AttentionMask(allowed=seen(bounds, queries, 20, window))
    expected = attention(q, k, v, mask=allowed, **options | {"backend": "reference"})
    assert (found.output - expected.output).abs().max() < 1e-5
    for name in STATISTICS:
        assert torch.allclose(
            found.statistics[name], expected.statistics[name].to(found.output), atol=1e-5
        ), name


def test_each_prompt_may_have_blocks_of_its_own_and_many_take_no_room():
    torch.manual_seed(0)
    q = torch.randn(2, 1, 6, 4)
    bounds = [[0, 2, 6], [0, 5, 6]]
    found = attention(q, q, q, mask=AttentionMask(causal=True, blocks=bounds)).output
    for row, own in enumerate(bounds):
        alone = attention(*[q[row : row + 1]] * 3, mask=AttentionMask(allowed=seen(own, 6, 6)))
        assert (found[row] - alone.output[0]).abs().max() < 1e-6
    from lens_kernels.masks import lower_mask

    long = torch.zeros(1, 1, 32768, 1)
    plan = lower_mask(AttentionMask(causal=True, blocks=range(0, 32769, 256)), long, long)
    assert plan.allowed is None
    assert plan.high[0, [0, 255, 256, 32767]].tolist() == [256, 256, 512, 32768]


def test_blocks_that_are_none_are_refused():
    q = torch.zeros(1, 1, 4, 2)
    for mask, said in [
        ({"blocks": [0, 4]}, "set causal=True or leave blocks out"),
        ({"causal": True, "blocks": [0, 5]}, "blocks must rise from 0 to at most 4"),
        ({"causal": True, "blocks": [1, 4]}, "blocks must rise from 0"),
        ({"causal": True, "blocks": [0]}, "blocks needs at least two entries"),
    ]:
        with pytest.raises(ValueError, match=said):
            attention(q, q, q, mask=AttentionMask(**mask))
