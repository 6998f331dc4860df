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
    entropy = page.routed.variables["entropy"][0]
    for head in range(4):
        tokens = [token for token in range(9) if page.chosen[token, head]]
        if tokens:
            expected = np.mean([float(entropy[head, token]) for token in tokens])
            assert float(page.used[head]) == pytest.approx(expected, abs=1e-5)
    x = torch.randn(1, 9, 24)
    with torch.no_grad():
        scores, whole = page.moh.model.module.router(x)[0], page.moh.model(x)
        # taken out, a head is missed by the tokens that chose it, and by no other
        for head in range(4):
            with lens.edit(page.moh, lens.edits.Ablate(f"L0H{head}")):
                missed = (page.moh.model(x) - whole)[0].abs().amax(-1) > 1e-6
            assert missed.tolist() == [head in row.topk(2).indices for row in scores]


def test_global_tokens_see_all_and_are_seen_by_all(page):
    found = page.whole.variables["block_mass"][0]
    seen = found > 0
    for row in range(13):
        for key in range(13):
            expected = min(row, key) < 4 or abs(row - key) <= 2
            assert bool(seen[:, row, key].all()) == bool(seen[:, row, key].any()) == expected
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 13), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_branches_of_native_sparse_attention_are_parts(page):
    module, x = page.nsa.model.module, torch.randn(1, 16, 24)
    with lens.traces.capturing(page.nsa, block_size=1) as recorder:
        output = page.nsa.model(x)
    assert [(one.layer, one.part, one.keys) for one in recorder.records] == [
        (0, 0, 5),
        (0, 1, 16),
        (0, 2, 16),
    ]
    maps = [one.variables["block_mass"][0] for one in recorder.records]
    q, k, v = module.qkv(x)[0].unflatten(-1, (3, 3, 8)).permute(1, 2, 0, 3)
    means = [
        torch.stack([one[:, 4 * b : 4 * b + 4].mean(1) for b in range(4)], 1) for one in (k, v)
    ]
    gates, mixed = module.gates(x)[0].sigmoid(), torch.zeros(16, 3, 8)
    for row in range(16):
        past = [block for block in range(4) if 4 * block + 3 <= row]
        logits = torch.cat(
            [torch.zeros(3, 1), (q[:, row, None] * means[0][:, past]).sum(-1) / 8**0.5], 1
        )
        blocks = logits.softmax(-1)
        torch.testing.assert_close(maps[0][:, row, : len(past) + 1], blocks, atol=1e-5, rtol=0)
        points = blocks[:, 1:].sum(0).tolist()
        best = sorted(
            (block for block in past if block != row // 4), key=lambda block: -points[block]
        )
        own = {row // 4, *best[:1]}
        heads = [(blocks[:, 1:, None] * means[1][:, past]).sum(1)]
        places = [
            [key for key in range(row + 1) if key // 4 in own],
            [key for key in range(row + 1) if row - key < 5],
        ]
        for found, keys in zip(maps[1:], places, strict=True):
            weights = ((q[:, row, None] * k[:, keys]).sum(-1) / 8**0.5).softmax(-1)
            torch.testing.assert_close(found[:, row, keys], weights, atol=1e-5, rtol=0)
            torch.testing.assert_close(found[:, row].sum(-1), torch.ones(3), atol=1e-5, rtol=0)
            heads.append((weights[..., None] * v[:, keys]).sum(1))
        mixed[row] = sum(gates[row, branch] * one for branch, one in enumerate(heads))
    torch.testing.assert_close(output[0], module.out(mixed.flatten(1)), atol=1e-5, rtol=1e-4)


def test_landmarks_are_a_trace_of_the_given_matrix(page):
    assert page.trace.heads == 2
    received = page.matrix.sum(-2).numpy()
    np.testing.assert_allclose(page.trace.received.values[0], received, atol=1e-4)
