"""States of key groups on gathered keys: equal to whole probabilities, or refused."""

from dataclasses import replace

import pytest
import torch

from lens.edits._gathered import MOST_MASKED, gathered_states
from lens.passes.calls import LayerCall
from lens.passes.structures import MaskStructure
from tests.lens.naive import rms_ratio

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 2, 6, 3, 29, 37, 8, 5


def a_call():
    random = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(BATCH, heads, tokens, dim, generator=random) * 2
        for heads, tokens, dim in (
            (HEADS, QUERIES, DIM),
            (KV_HEADS, KEYS, DIM),
            (KV_HEADS, KEYS, VALUE_DIM),
        )
    )
    groups = torch.full((BATCH, KEYS), -1, dtype=torch.int32)
    groups[0, 3:17], groups[1, 5:11] = 2, 2
    groups[0, [0, 30]], groups[1, [2, 24, 36]] = 0, 0  # before the rows, among them, after the last
    groups[0, 7] = 1  # of the second prompt none
    rows = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    rows[0, 17 - (KEYS - QUERIES) :] = True
    rows[1, 4:-3] = True
    mask = MaskStructure(causal=True)
    return LayerCall(q, k, v, mask, 0.3, None, None, None, None), groups, rows


def test_states_are_those_of_whole_probabilities():
    call, groups, rows = a_call()
    q, k, v = (
        tensor.double().repeat_interleave(HEADS // tensor.shape[1], 1)
        for tensor in (call.query, call.key, call.value)
    )
    logits = q @ k.transpose(-1, -2) * call.scale
    hidden = torch.ones(QUERIES, KEYS).triu(KEYS - QUERIES + 1).bool()
    logits = logits.masked_fill(hidden, -torch.inf)
    found = gathered_states(call, groups, 3, rows, "auto")
    assert found is not None
    assert len(found) == 3
    for group, (lse, output) in enumerate(found):
        own = logits.masked_fill((groups != group)[:, None, None], -torch.inf)
        expected = own.logsumexp(-1)
        empty = expected == -torch.inf
        chosen = rows[:, None].expand_as(empty)
        assert torch.equal((lse == -torch.inf) & chosen, empty & chosen)
        assert (output[empty & chosen] == 0).all()
        seen = chosen & ~empty
        assert seen.any()
        assert rms_ratio(lse[seen], expected[seen]) < 1e-6
        weights = torch.nan_to_num(own.softmax(-1))
        assert rms_ratio(output[seen], (weights @ v)[seen]) < 1e-5


def test_groups_without_any_key_are_empty():
    call, groups, rows = a_call()
    groups[groups == 1] = -1
    found = gathered_states(call, groups, 3, rows, "auto")
    assert found is not None
    assert (found[1][0] == -torch.inf).all()
    assert (found[1][1] == 0).all()
    groups[groups == 0] = -1
    found = gathered_states(call, groups, 3, rows, "auto")
    assert found is not None
    assert (found[0][0] == -torch.inf).all()
    assert (found[2][0][rows[:, None].expand(-1, HEADS, -1)] > -torch.inf).all()


@pytest.mark.parametrize("why", ["text between", "window", "many", "bias", "own mask", "ahead"])
def test_rows_that_see_different_keys_are_left_to_the_kernel(why):
    call, groups, rows = a_call()
    if why == "text between":
        groups[0, 20] = 2
    elif why == "window":
        call = replace(call, mask=MaskStructure(causal=True, window=9))
    elif why == "bias":
        call = replace(call, position_bias=torch.zeros(1, HEADS, QUERIES, KEYS))
    elif why == "own mask":
        allowed = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
        call = replace(call, mask=MaskStructure(causal=True, allowed=allowed))
    elif why == "ahead":
        call = replace(call, mask=MaskStructure(causal=False))
    else:
        extra = MOST_MASKED + 1
        longer = [
            torch.cat([torch.zeros(BATCH, KV_HEADS, extra, x.shape[3]), x], 2)
            for x in (call.key, call.value)
        ]
        call = replace(call, key=longer[0], value=longer[1])
        groups = torch.cat([torch.zeros(BATCH, extra, dtype=torch.int32), groups], 1)
    assert gathered_states(call, groups, 3, rows, "auto") is None
