"""Attention over pieces of the keys against attention over all of them."""

import pytest
import torch
from lens_kernels import AttentionMask, attention, explain, reference
from lens_kernels.decoding import decode
from lens_kernels.dispatch import load
from lens_kernels.splits import run_split
from lens_kernels.validation import make_problem
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.kernels.helpers import (
    BACKENDS,
    CASES,
    PART_OF_OTHERS,
    Case,
    assert_close,
    case_problem,
    compare,
    few,
    ids,
    run_or_skip,
    tensors,
)

CAUSAL = AttentionMask(causal=True)
SINKS = torch.tensor([0.5, -1.0, 3.0, 40.0])
FEW = [
    Case("one", 1, 59, lambda h, q, k: CAUSAL),
    Case("three", 3, 53, lambda h, q, k: AttentionMask(causal=True, key_start=[0, 7], window=31)),
]


def split(problem, backend, piece):
    return run_split(problem, lambda part: run_or_skip(backend, part), piece)


def grouped(case, device="cpu"):
    return (torch.arange(2 * case.keys, device=device) * 7 % 11 % 3).view(2, case.keys)


@pytest.mark.parametrize("case", few(CASES, *PART_OF_OTHERS))
def test_every_statistic_under_every_mask(case):
    options = {"sink_logits": SINKS, "softcap": 2.5, "groups": grouped(case), "block_size": (7, 4)}
    problem = case_problem(case, "cpu", **options)
    compare(problem, split(problem, "torch", 20), reference.run(problem), 1e-5)


@pytest.mark.parametrize("case", FEW, ids=ids(FEW))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_few_queries_on_every_backend(backend, device, case):
    options = {"sink_logits": SINKS.to(device), "groups": grouped(case, device), "grid": None}
    problem = case_problem(case, device, block_size=(2, 16), **options, statistics=("lse", *WANTED))
    compare(problem, split(problem, backend, 16), reference.run(problem), 1e-5)


WANTED = ("entropy", "distance", "moments", "block_mass", "block_max", "top_keys", "received")


@pytest.mark.parametrize("piece", [4, 16, 52, 100])
def test_any_piece_gives_the_same(piece):
    problem = case_problem(FEW[1], "cpu", block_size=(2, 4), groups=grouped(FEW[1]))
    compare(problem, split(problem, "torch", piece), reference.run(problem), 1e-5)


def test_block_masks_are_cut_along():
    kept = torch.rand(2, 4, 2, 14, generator=torch.Generator().manual_seed(0)) > 0.4
    problem = case_problem(FEW[1], "cpu", block_size=(2, 4), block_mask=kept)
    compare(problem, split(problem, "torch", 12), reference.run(problem), 1e-5)


def test_float64_keeps_its_precision():
    query, key, value = (part.double() for part in tensors(2, 4, 2, 3, 53))
    problem = make_problem(query, key, value, mask=CAUSAL, statistics="all", block_size=4)
    compare(problem, split(problem, "torch", 12), reference.run(problem), 1e-13)


def test_the_keys_of_a_cache_are_not_copied():
    """One row of the batch, one run over the whole pieces: what runs is the cache's own memory."""
    query, key, value = tensors(1, 4, 2, 1, 67)
    parts = []

    def spy(part):
        parts.append(part)
        return load("torch").run(part)

    run_split(make_problem(query, key, value, mask=CAUSAL), spy, 64)
    run_split(make_problem(query, key, value, mask=CAUSAL), spy, 64 // 4)
    assert [(part.batch, part.keys) for part in parts] == [(1, 64), (1, 3), (4, 16), (1, 3)]
    for part in parts:
        assert part.key.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        assert part.value.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()


def test_decode_is_attention():
    query, key, value = tensors(2, 4, 2, 2, 331)
    options = {"mask": CAUSAL, "statistics": "all", "groups": None, "sink_logits": SINKS}
    whole = attention(query, key, value, **options, backend="torch")
    found = decode(query, key, value, piece=64, **options, backend="torch")
    assert found.backend == "torch"
    assert_close(found.output, whole.output, 1e-6)
    assert set(found.statistics) == set(whole.statistics)
    for name in set(whole.statistics) - {"top_keys"}:
        assert_close(found.statistics[name], whole.statistics[name], 1e-5, name)
    assert found.statistics.diagonal_start == whole.statistics.diagonal_start


class Operations(TorchDispatchMode):
    """Names of the tensor operations inside it that read or write memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _leave_kernels_out(monkeypatch):
    """The interpreter works with tensors itself: outputs stay 0."""
    from lens_kernels import triton_launch

    def zeros(problem, *sizes, dtype=torch.float32):
        with _disable_current_modes():
            return torch.zeros(sizes, dtype=dtype)

    monkeypatch.setattr(triton_launch, "new", zeros)
    monkeypatch.setattr(triton_launch, "launch", lambda *arguments, **constants: None)


@pytest.mark.parametrize(
    ("backend", "statistics", "most"),
    [("cpu", ("lse",), 2), ("cpu", "all", 12), ("triton", ("lse",), 7), ("triton", "all", 56)],
)
def test_a_step_takes_few_operations(backend, statistics, most, monkeypatch):
    """What a mask and a shape decide is made once; what is left is the kernel, its outputs and a look at them."""
    query, key, value = tensors(1, 4, 2, 1, 600, 64, 64)
    labels = torch.arange(600)
    pairs = [(labels[-1:], labels), (labels[-1:] % 7, labels % 7)]
    options = {"mask": CAUSAL, "statistics": statistics}
    if statistics == "all":
        options["match"] = pairs
    if backend == "triton":
        _leave_kernels_out(monkeypatch)
    if explain(query, key, value, **options).obstacles[backend] is not None:
        pytest.skip("not here")
    attention(query, key, value, **options, backend=backend)
    with Operations() as second:
        attention(query, key, value, **options, backend=backend)
    assert 0 < len(second.names) <= most, second.names


def test_gradients_flow_through_decode():
    inputs = [part.double() for part in tensors(1, 4, 2, 2, 53)]

    def gradients(run):
        leaves = [part.clone().requires_grad_() for part in inputs]
        result = run(*leaves, mask=CAUSAL, statistics=("lse", "block_attribution"), backend="torch")
        (result.output.square().sum() + result.statistics.lse.sum()).backward()
        return [*(leaf.grad for leaf in leaves), result.statistics.block_attribution]

    def in_pieces(*leaves, **options):
        return decode(*leaves, piece=64, **options)

    for actual, expected in zip(gradients(in_pieces), gradients(attention), strict=True):
        assert_close(actual, expected, 1e-12)


def test_only_what_was_asked_for():
    query, key, value = tensors(1, 4, 2, 2, 53)
    result = decode(query, key, value, piece=64, statistics=("top_mass",))
    assert set(result.statistics) == {"top_keys", "top_mass"}
    assert result.groups is None


@pytest.mark.parametrize(
    ("queries", "piece", "message"),
    [
        (67, 64, "decode takes up to 64 queries, got 67; call attention"),
        (3, 50, "piece must be a multiple of the key block 64, got 50"),
        (3, 0, "piece must be a multiple of the key block 64, got 0"),
    ],
)
def test_refusals(queries, piece, message):
    query, key, value = tensors(1, 4, 2, queries, 53)
    with pytest.raises(ValueError, match=message):
        decode(query, key, value, piece=piece)
