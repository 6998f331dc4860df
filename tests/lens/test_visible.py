"""How many queries see each key: counts of a window against a mask that is written out."""

import numpy as np
import pytest
import torch
from lens_kernels import attention
from transformers.masking_utils import (
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

import lens
from lens.passes.masks import structured_mask
from lens.passes.structures import MaskStructure
from lens.traces.uniform import visible_queries
from tests.lens.architectures import build

WINDOWS = [None, 1, 2, 3, 4, 7, 8, 16, 17, 18, 40]


def written_out(
    queries: int, keys: int, causal: bool, window: int | None, padding: torch.Tensor | None
) -> torch.Tensor:
    """bool [batch, queries, keys], one pair after the other; the last query stands on the last key."""
    real = torch.ones(1, keys, dtype=torch.bool) if padding is None else padding
    mask = torch.zeros(len(real), queries, keys, dtype=torch.bool)
    for row in range(len(real)):
        for query in range(queries):
            place = query + keys - queries
            for key in range(keys):
                near = window is None or abs(place - key) < window
                seen = near and (key <= place or not causal)
                mask[row, query, key] = seen and bool(real[row, place] and real[row, key])
    return mask


def paddings(keys: int) -> list[torch.Tensor | None]:
    index = torch.arange(keys)
    return [None, torch.stack([index >= 0, index >= 3]), torch.stack([index < keys - 5, index > 0])]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two_way"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (1, 17), (5, 17), (16, 17)])
def test_counts_are_those_of_the_mask_written_out(causal, window, queries, keys):
    """Whole prompts and a few queries on cached keys."""
    for padding in paddings(keys):
        structure = MaskStructure(causal, window, padding)
        batch = 1 if padding is None else len(padding)
        expected = written_out(queries, keys, causal, window, padding).sum(1)
        assert structure.visible(batch, queries, keys).tolist() == expected.tolist()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two_way"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_trace_counts_alike(causal, window):
    found = visible_queries(17, causal=causal, window=window)
    assert found.tolist() == written_out(17, 17, causal, window, None)[0].sum(0).tolist()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two_way"])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("cached", [0, 6])
def test_windows_of_transformers_are_counted_as_it_masks(causal, size, cached):
    """A sliding cache holds the last keys only: its first key stands at `kv_offset`."""
    if causal:
        function = sliding_window_causal_mask_function(size)
    else:
        function = sliding_window_bidirectional_mask_function(size)
    queries, keys, first = 11, 11 + cached, 5 * bool(cached)
    places = (2, queries, keys, first + cached, first, function)
    spelled = sdpa_mask(*places, allow_is_causal_skip=False)
    assert spelled is not None
    structure = structured_mask(*places).structure
    assert structure.allowed is None
    expected = spelled[:, 0].sum(1).expand(2, -1)
    assert structure.visible(2, queries, keys).tolist() == expected.tolist()
    mask = structure.for_kernel(queries)
    part = torch.zeros(2, 1, keys, 4)
    names = ("received",)
    ours = attention(part[:, :, :queries], part, part, mask=mask, statistics=names)
    row = spelled[:, 0].float()
    uniform = (row / row.sum(-1, keepdim=True)).sum(1).expand(2, -1)
    assert torch.allclose(ours.statistics.received[:, 0], uniform, atol=1e-5)


@pytest.mark.parametrize("architecture", ["modernbert", "gemma2"])
def test_uniform_attention_is_received_once_per_viewer(architecture):
    """With q and k of zero each of n visible keys gets 1/n: what a model's layers say adds up."""
    model = lens.load(build(architecture))
    with torch.no_grad():
        for name, part in model.model.named_parameters():
            if any(word in name for word in ("Wqkv", "q_proj", "k_proj")):
                part.zero_()
    trace = lens.capture(model, list(range(3, 40)), statistics=["received"])
    for layer, window in enumerate(trace.attrs["windows"]):
        mask = written_out(37, 37, trace.attrs["causal"], window, None)[0].numpy()
        assert trace.visible.values[layer].tolist() == mask.sum(0).tolist()
        uniform = (mask / mask.sum(1, keepdims=True)).sum(0)
        np.testing.assert_allclose(trace.received.values[layer, 0], uniform, rtol=1e-3)
