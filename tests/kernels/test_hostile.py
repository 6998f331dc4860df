"""What callers do to every backend alike: calls from several threads, inputs that share memory or lie across it, and
switches of torch that change what an operation gives."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from lens_kernels import AttentionMask, attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

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


@contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _with_gradients(backend, inputs, bias):
    """Output, statistics, gradients and what they bring."""
    inputs = [part.clone().requires_grad_() for part in inputs]
    asked = {**OPTIONS, "statistics": (*STATISTICS, "block_attribution")}
    asked["mask"] = AttentionMask(causal=True, bias=bias)
    result = attention(*inputs, **asked, backend=backend)
    found = [result.output, *(result.statistics[name] for name in STATISTICS)]
    upstream = torch.linspace(-1, 1, 16, dtype=torch.float32, device="cpu")
    result.output.backward(upstream.to(result.output).expand_as(result.output))
    return [*found, result.statistics["block_attribution"], *(part.grad for part in inputs)]


SWITCHES = {
    "float64 by default": lambda: default_type(torch.float64),
    "bfloat16 by default": lambda: default_type(torch.bfloat16),
    "meta device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_switches_of_torch_change_nothing(backend, switch):
    inputs, bias = tensors(1, 2, 1, 37, 37), torch.linspace(-1, 1, 37)[None]
    expected = _with_gradients(backend, inputs, bias)
    with SWITCHES[switch]():
        found = _with_gradients(backend, inputs, bias)
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine, right)
        assert mine.dtype == right.dtype


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_a_bias_of_another_type_and_negated_views(backend):
    query, key, value = tensors(1, 2, 1, 37, 37)
    bias = torch.linspace(-1, 1, 37)[None]
    expected = _with_gradients(backend, (query, key, value), bias)
    negated = [torch._neg_view(-part) for part in (query, key, value, bias)]
    for inputs, given in (((query, key, value), bias.double()), (negated[:3], negated[3])):
        for mine, right in zip(_with_gradients(backend, inputs, given), expected, strict=True):
            assert rms_ratio(mine, right) < 1e-6


def fake(call, query):
    call(FakeTensorMode().from_tensor(query))


def dual(call, query):
    with forward_ad.dual_level():
        call(forward_ad.make_dual(query, query))


@pytest.mark.parametrize(
    ("message", "run"),
    [
        ("transform of torch.func", lambda call, query: torch.func.vmap(call)(query[None])),
        ("transform of torch.func", lambda call, query: torch.func.grad(call)(query)),
        ("transform of torch.func", lambda call, query: torch.func.jvp(call, (query,), (query,))),
        ("forward derivative", dual),
        ("fake tensor", fake),
        ("sparse_coo; give a dense", lambda call, query: call(query.to_sparse())),
        ("torch.jit.trace records", lambda call, query: torch.jit.trace(call, (query,))),
        ("on the meta device", lambda call, query: call(query.to("meta"))),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensors_without_numbers_to_read_are_refused(message, run):
    query, key, value = tensors(1, 2, 1, 61, 61)  # a length of its own, for plans that are kept
    call = lambda given: attention(given, key, value, **OPTIONS).output.sum()  # noqa: E731
    with pytest.raises((TypeError, ValueError), match=message):
        run(call, query)
    assert call(query).isfinite()
