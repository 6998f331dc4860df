"""What callers do to every backend alike: calls from several threads, inputs that share memory or lie across it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lens_kernels import AttentionMask, attention

from tests.kernels.helpers import BACKENDS, rms_ratio, tensors

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


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_inputs_that_are_repeated_transposed_or_one_tensor(backend, device):
    query, key, value = (part.to(device) for part in tensors(2, 4, 4, 35, 35, 16, 16))
    across = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value)]
    apart = [torch.cat([part, part], -1)[..., ::2] for part in (query, key, value)]
    shared = key[:1, :1].expand(2, 4, -1, -1)
    for given in (across, apart, (query, shared, shared), (query, query, query)):
        expected = _numbers("reference", *(part.double().contiguous() for part in given))
        for found, right in zip(_numbers(backend, *given), expected, strict=True):
            assert rms_ratio(found, right) < 1e-5
