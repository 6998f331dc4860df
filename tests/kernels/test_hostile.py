"""What callers do to every backend alike: calls from several threads, inputs that share memory or lie across it."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from lens_kernels import AttentionMask, attention

from tests.kernels.helpers import BACKENDS, CUDA, rms_ratio, tensors

HERE = [*BACKENDS]
if find_spec("triton") and not CUDA:
    HERE.append(pytest.param("triton", "cpu", id="interpreter"))

STATISTICS = ("lse", "entropy", "block_mass", "received", "diagonal")
OPTIONS = {"mask": AttentionMask(causal=True), "statistics": STATISTICS, "block_size": 16}


def _numbers(backend, *inputs, **more):
    result = attention(*inputs, **OPTIONS, backend=backend, **more)
    return [result.output, *(result.statistics[name] for name in STATISTICS)]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_calls_from_several_threads_do_not_meet(backend, device):
    inputs = [[part.to(device) for part in tensors(1, 2, 1, 33 + n, 33 + n)] for n in range(4)]
    alone = [_numbers(backend, *one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: _numbers(backend, *inputs[number % 4]), range(12)))
    for number, found in enumerate(together):
        for mine, expected in zip(found, alone[number % 4], strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize(("backend", "device"), HERE)
def test_inputs_that_are_repeated_transposed_or_one_tensor(backend, device):
    sizes = (
        (1, 2, 2, 19, 19, 16, 16)
        if (backend, device) == ("triton", "cpu")
        else (2, 4, 4, 35, 35, 16, 16)
    )
    query, key, value = (part.to(device) for part in tensors(*sizes))
    across = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value)]
    apart = [torch.cat([part, part], -1)[..., ::2] for part in (query, key, value)]
    shared = key[:1, :1].expand(*key.shape[:2], -1, -1)
    still = key[:, :, :1].expand(-1, -1, key.shape[2], -1)
    turned = [part.flip(2) for part in (query, key, value)]
    for given in (across, apart, turned, (query, shared, still), (query, query, query)):
        expected = _numbers("reference", *(part.double().contiguous() for part in given))
        for found, right in zip(_numbers(backend, *given), expected, strict=True):
            assert rms_ratio(found, right) < 1e-5


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_labels_that_are_changed_in_place_are_read_anew(backend, device):
    """Those that are given again are checked once."""
    inputs = [part.to(device) for part in tensors(1, 2, 1, 12, 12)]
    labels, groups = (
        torch.arange(12, device=device),
        torch.zeros(1, 12, dtype=torch.long, device=device),
    )
    groups[0, 1:] = 1
    asked = {"match": [(labels, labels)], "groups": groups, "backend": backend}
    asked |= {"mask": AttentionMask(causal=True), "statistics": ("match_mass", "lse")}
    first = attention(*inputs, **asked)
    assert float(attention(*inputs, **asked).statistics["match_mass"].max()) < 2
    labels[:], groups[0, :6] = 3, 0
    again = attention(*inputs, **asked)
    assert torch.allclose(
        again.statistics["match_mass"], torch.ones_like(again.statistics["lse"])[..., None]
    )
    assert first.groups is not None
    assert again.groups is not None
    assert bool((again.groups.lse[0, 0, :, 5] > first.groups.lse[0, 0, :, 5]).all())
    if device == "cpu":  # by numpy, which torch does not count
        groups.numpy()[0, :6] = 1
        third = attention(*inputs, **asked).groups
        assert third is not None
        assert bool((third.lse[0, 0, :, 5] < again.groups.lse[0, 0, :, 5]).all())
