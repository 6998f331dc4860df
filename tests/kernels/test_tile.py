"""Rectangles of `P` from q, k and LSE, in numpy and torch, against the materialised definition."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lens_kernels import AttentionMask, attention, reference, tile
from lens_kernels.validation import make_problem

from tests.kernels.helpers import assert_close, tensors

RECTANGLES = [((0, 37), (0, 53)), ((5, 17), (11, 31)), ((36, 37), (52, 53)), ((0, 1), (0, 53))]
BIAS = torch.randn(1, 4, 37, 53, generator=torch.Generator().manual_seed(4))
ALLOWED = torch.rand(37, 53, generator=torch.Generator().manual_seed(5)) > 0.3
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.1])

# name: (arguments of the mask, arguments of attention, arguments of tile)
OPTIONS = {
    "none": ({}, {}, {}),
    "causal": ({"causal": True}, {}, {"causal": True}),
    "window": ({"causal": True, "window": 7}, {}, {"causal": True, "window": 7}),
    "window both ways": ({"window": 7}, {}, {"window": 7}),
    "softcap": ({"causal": True}, {"softcap": 1.5}, {"causal": True, "softcap": 1.5}),
    "scale": ({}, {"scale": 0.07}, {"scale": 0.07}),
    "sinks": (
        {"causal": True},
        {"sink_logits": torch.tensor([0.5, -1.0, 3.0, 9.0])},
        {"causal": True},
    ),
    "prefix": ({"causal": True, "prefix": 29}, {}, {"causal": True, "prefix": 29}),
    "left padding": (
        {"causal": True, "key_start": [5, 5], "prefix": 20},
        {},
        {"causal": True, "key_start": 5, "prefix": 20},
    ),
    "right padding": ({"key_lengths": [41, 41]}, {}, {"key_end": 41}),
    "alibi": (
        {"causal": True, "alibi_slopes": SLOPES},
        {},
        {"causal": True, "alibi_slopes": SLOPES},
    ),
    "alibi both ways": ({"alibi_slopes": SLOPES}, {}, {"alibi_slopes": SLOPES}),
    "bias": ({"bias": BIAS}, {}, {"bias": BIAS}),
    "bias of a key": ({"bias": BIAS[:, :, :1]}, {}, {"bias": BIAS[:, :, :1]}),
    "allowed": ({"allowed": ALLOWED}, {}, {"allowed": ALLOWED}),
    "everything": (
        {"causal": True, "window": 23, "bias": BIAS, "allowed": ALLOWED, "alibi_slopes": SLOPES},
        {"softcap": 2.0, "scale": 0.3},
        {
            "causal": True,
            "window": 23,
            "bias": BIAS,
            "allowed": ALLOWED,
            "alibi_slopes": SLOPES,
            "softcap": 2.0,
            "scale": 0.3,
        },
    ),
}


def to_numpy(options):
    return {
        name: part.numpy() if isinstance(part, torch.Tensor) else part
        for name, part in options.items()
    }


@pytest.mark.parametrize("rectangle", RECTANGLES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_rectangle_under_every_option(name, rectangle):
    of_mask, of_attention, options = OPTIONS[name]
    query, key, value = tensors(2, 4, 2, 37, 53)
    mask = AttentionMask(**of_mask)
    lse = attention(query, key, value, mask=mask, **of_attention).statistics.lse
    problem = make_problem(query, key, value, mask=mask, **of_attention)
    rows, columns = rectangle
    expected = reference.probabilities(problem)[..., slice(*rows), slice(*columns)]
    as_torch = tile(query, key, lse, rows, columns, **options)
    as_numpy = tile(query.numpy(), key.numpy(), lse.numpy(), rows, columns, **to_numpy(options))
    assert as_torch.dtype == torch.float32
    assert as_numpy.dtype == np.float32
    assert_close(as_torch, expected, 3e-6)
    assert_close(torch.from_numpy(as_numpy), expected, 3e-6)


@pytest.mark.parametrize("heads", [None, 1, 3])
def test_one_head_or_some(heads):
    """[queries, head_dim] alone, as the viewer stores it, and the same within more axes."""
    query, key, value = (part[0] for part in tensors(1, 3, 3, 37, 53))
    lse = attention(query[None], key[None], value[None]).statistics.lse[0]
    whole = tile(query, key, lse, (3, 11), (5, 23))
    pick = slice(0, heads) if heads else 0
    assert_close(tile(query[pick], key[pick], lse[pick], (3, 11), (5, 23)), whole[pick], 1e-6)


def test_tiles_lie_side_by_side():
    query, key, value = tensors(1, 2, 1, 37, 53)
    lse = attention(query, key, value).statistics.lse
    whole = tile(query, key, lse, (0, 37), (0, 53))
    rows = [
        torch.cat([tile(query, key, lse, r, c) for c in ((0, 20), (20, 41), (41, 53))], -1)
        for r in ((0, 13), (13, 37))
    ]
    assert_close(torch.cat(rows, -2), whole, 1e-6)
    assert_close(whole.sum(-1), torch.ones(1, 2, 37), 1e-6)


def test_float64_inputs_keep_their_precision():
    query, key, value = (part.double() for part in tensors(1, 2, 1, 37, 53))
    problem = make_problem(query, key, value)
    lse = reference.run(problem).tensors["lse"]
    found = tile(query.numpy(), key.numpy(), lse.numpy(), (0, 37), (0, 53))
    assert_close(torch.from_numpy(found), reference.probabilities(problem), 1e-13)
    with_one = tile(query.float().numpy(), key.float().numpy(), lse.numpy(), (0, 37), (0, 53))
    assert with_one.dtype == np.float64


def test_half_precision_storage():
    query, key, value = tensors(1, 2, 1, 37, 53, dtype=torch.float16)
    result = attention(query, key, value)
    expected = reference.probabilities(make_problem(query, key, value))
    lse = result.statistics.lse
    found = tile(query.numpy(), key.numpy(), lse.numpy(), (0, 37), (0, 53))
    assert_close(torch.from_numpy(found), expected, 1e-5)


def test_rows_that_see_nothing_are_zero_without_a_warning():
    query, key, value = tensors(1, 2, 1, 41, 37)
    mask = AttentionMask(causal=True)
    lse = attention(query, key, value, mask=mask).statistics.lse
    found = tile(query.numpy(), key.numpy(), lse.numpy(), (0, 41), (0, 37), causal=True)
    assert not found[..., :4, :].any()
    assert_close(torch.from_numpy(found[..., 4:, :].sum(-1)), torch.ones(1, 2, 37), 1e-6)


def test_only_the_rectangle_is_read():
    """What lies outside may be anything: here NaN."""
    query, key, value = tensors(1, 2, 1, 37, 53)
    lse = attention(query, key, value).statistics.lse
    expected = tile(query, key, lse, (5, 17), (11, 31))
    outside_rows = (torch.arange(37) < 5) | (torch.arange(37) >= 17)
    outside_keys = (torch.arange(53) < 11) | (torch.arange(53) >= 31)
    query[:, :, outside_rows], lse[:, :, outside_rows] = torch.nan, torch.nan
    key[:, :, outside_keys] = torch.nan
    assert torch.equal(tile(query, key, lse, (5, 17), (11, 31)), expected)


def test_an_offset_places_the_queries():
    """Captured queries of a later step: positions are theirs, not the last ones."""
    query, key, value = tensors(1, 2, 1, 37, 53)
    mask = AttentionMask(allowed=torch.arange(53) <= torch.arange(37)[:, None] + 4)
    lse = attention(query, key, value, mask=mask).statistics.lse
    expected = reference.probabilities(make_problem(query, key, value, mask=mask))
    found = tile(query, key, lse, (0, 37), (0, 53), causal=True, offset=4)
    assert_close(found, expected, 1e-6)


def test_numpy_is_enough():
    """The viewer starts without torch."""
    root = Path(__file__).parents[2]
    code = (
        "import sys, numpy as np\n"
        "from lens_kernels import tile\n"
        "q = np.zeros((3, 2)); p = tile(q, q, np.log([3.0, 3, 3]), (0, 2), (0, 3))\n"
        "assert abs(p - 1 / 3).max() < 1e-12, p\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root / "kernels", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


Q, K, LSE = np.zeros((4, 7, 3)), np.zeros((2, 11, 3)), np.zeros((4, 7))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, K, LSE, (3, 3), (0, 5)), {}, r"query_range must be .* within 0\.\.7, got \(3, 3\)"),
        ((Q, K, LSE, (0, 3), (0, 12)), {}, r"key_range must be .* within 0\.\.11, got \(0, 12\)"),
        ((Q, K, LSE, (-2, 3), (0, 5)), {}, r"query_range must be .* got \(-2, 3\)"),
        ((Q, K, LSE, (0, 3), (0, 5)), {"window": 0}, "window must be at least 1"),
        ((Q, K[..., :2], LSE, (0, 3), (0, 5)), {}, r"equal head_dim .* got query \[4, 7, 3\], key"),
        ((Q, K[0], LSE, (0, 3), (0, 5)), {}, r"number of axes, got query"),
        ((Q, K, LSE[:3], (0, 3), (0, 5)), {}, "lse must be of the query's shape without head_dim"),
        ((Q[:3], K, LSE[:3], (0, 3), (0, 5)), {}, "heads must be a multiple of kv_heads"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tile(*arguments, **options)


def test_names_of_the_package_are_loaded_on_first_use():
    code = (
        "import sys, lens_kernels\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(lens_kernels.__all__) <= set(dir(lens_kernels))\n"
        "assert all(getattr(lens_kernels, name) is not None for name in lens_kernels.__all__)\n"
        "assert 'torch' in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root / "kernels", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import lens_kernels

    with pytest.raises(AttributeError, match="module 'lens_kernels' has no attribute 'spam'"):
        _ = lens_kernels.spam
