"""The modules that docs/any-attention.md shows: its blocks run, and what they capture is the definition's."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import lens

PAGE = Path(__file__).parents[2] / "docs/any-attention.md"


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "F": functional, "lens": lens}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return SimpleNamespace(**names)


def test_channels_attend_with_the_temperature_of_their_head(page):
    module, x = page.xcit.model.module, torch.randn(1, 50, 24)
    with torch.no_grad(), lens.traces.capturing(page.xcit, block_size=1) as recorder:
        page.xcit.model(x)
    q, k, _ = module.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 4, 1)
    q, k = (one / one.norm(dim=-1, keepdim=True) for one in (q, k))
    expected = (torch.einsum("bhcn,bhdn->bhcd", q, k) * module.temperature).softmax(-1)
    found = recorder.records[0].variables["block_mass"]
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
    assert (page.channels.heads, page.channels.keys) == (3, 8)


def test_the_router_says_which_head_counts_for_which_token(page):
    assert page.chosen.sum(-1).tolist() == [2] * 9
    entropy = page.recorder.records[0].variables["entropy"][0]
    for head in range(4):
        tokens = [token for token in range(9) if page.chosen[token, head]]
        if tokens:
            expected = np.mean([float(entropy[head, token]) for token in tokens])
            assert float(page.used[head]) == pytest.approx(expected, abs=1e-5)


def test_landmarks_are_a_trace_of_the_given_matrix(page):
    assert page.trace.heads == 2
    received = page.matrix.sum(-2).numpy()
    np.testing.assert_allclose(page.trace.received.values[0], received, atol=1e-4)
