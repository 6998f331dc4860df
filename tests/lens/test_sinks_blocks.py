"""Bounds of alpha from block mass hold around the exact alpha, at 16k tokens too."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens
from lens.common.errors import LensError
from lens.sinks import block_bounds
from tests.lens.test_sinks import parked
from tests.lens.traces import BLOCK, probabilities, trace_of


def largest(alpha: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The largest alpha of each block of keys."""
    return np.maximum.reduceat(alpha, start, axis=-1)


def test_the_exact_alpha_lies_between_the_bounds():
    p = np.concatenate([probabilities(1, 3, 67, 4), np.repeat(parked(67, 0.8), 3, 1)])
    found = block_bounds(trace_of(p))
    assert found.start.tolist() == list(range(0, 67, BLOCK))
    assert found.stop[-1] == 67
    seen = 67 - np.arange(67)
    exact = largest(p.sum(2) / seen, found.start)
    assert (found.lower <= exact + 1e-6).all()
    assert (exact <= found.upper + 1e-6).all()
    received = np.add.reduceat(p.sum(2), found.start, axis=-1)
    expected = received / np.add.reduceat(seen, found.start)
    np.testing.assert_allclose(found.lower, expected, rtol=1e-5)
    table = found.table()
    assert table.query("layer == 1 and start == 0")["sink"].tolist() == ["undecided"] * 3
    assert (table["alpha_upper_bound"] <= 1).all()
    assert "hold a sink for certain" in found.findings()[0]


def test_a_block_of_sinks_is_certain_and_an_empty_one_is_none():
    p = np.zeros((1, 1, 64, 64))
    p[0, 0, :, 0] = 1
    found = block_bounds(trace_of(p), epsilon=0.05)
    assert found.table()["sink"].tolist() == ["yes", "no", "no", "not judged"]
    assert "1 more were not judged: fewer than 16 queries see one" in found.findings()[1]


def test_keys_that_few_queries_see_are_not_judged():
    """Every query looks at itself: the last keys, seen by few, would be sinks."""
    found = block_bounds(trace_of(np.eye(64)[None, None]), epsilon=0.1)
    assert found.lower[0, 0, -1] > 0.1
    assert found.table()["sink"].tolist()[-1] == "not judged"
    with pytest.raises(LensError, match=r"epsilon 0.01 says nothing here: the first key receives"):
        block_bounds(trace_of(np.eye(64)[None, None]), epsilon=0.01)


def test_at_16k_tokens():
    """The block map of 16,390 tokens bounds what `received` says exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20000,
    )
    model = lens.load(LlamaForCausalLM(config).eval())
    ids = torch.randint(3, 61, (16390,), generator=torch.Generator().manual_seed(1)).tolist()
    traces: Any = lens.capture(
        model, [ids], statistics=["received", "block_mass"], block_size=512, progress=False
    )
    trace = traces[0]
    found = block_bounds(trace)
    exact = largest(trace.received.values / trace.visible.values[:, None], found.start)
    assert found.lower.shape == (1, 2, 33)
    assert (found.lower <= exact * (1 + 1e-4)).all()
    assert (exact <= found.upper * (1 + 1e-4)).all()


def test_refusals():
    with pytest.raises(LensError, match="block_bounds needs block_mass; capture it"):
        block_bounds(trace_of(parked(67, 0.5), without=["block_mass"]))
    with pytest.raises(LensError, match=r"epsilon must lie between 0 and 1, got 1.5"):
        block_bounds(trace_of(parked(67, 0.5)), epsilon=1.5)
