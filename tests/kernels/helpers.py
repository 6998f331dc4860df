"""Comparison by RMS error ratio, the backends under test, and the masks they must all do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from lens_kernels import reference
from lens_kernels.dispatch import explain_problem, load
from lens_kernels.problem import BackendResult, Problem
from lens_kernels.types import AttentionMask
from lens_kernels.validation import make_problem
from torch import Tensor

CUDA = torch.cuda.is_available()
BACKENDS = [
    pytest.param("torch", "cpu", id="torch"),
    pytest.param("cpu", "cpu", id="cpu"),
    *(
        pytest.param(backend, "cuda", id=f"{backend}-cuda", marks=pytest.mark.gpu)
        for backend in ("triton", "torch")
        if CUDA
    ),
]
"""Without a GPU, Triton's interpreter takes a second per case: test_triton_interpreter.py."""


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected); infinite when shape, NaN or infinities differ."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape or bool(actual.isnan().any() | expected.isnan().any()):
        return float("inf")
    infinite = expected.isinf()
    if not torch.equal(actual.isinf(), infinite):
        return float("inf")
    if not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    error = (actual - expected)[~infinite].square().sum().sqrt()
    size = expected[~infinite].square().sum().sqrt()
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / size)


def assert_close(actual: Tensor, expected: Tensor, limit: float, name: str = "tensor") -> None:
    """Fails with the ratio when `rms_ratio` is above the limit."""
    ratio = rms_ratio(actual, expected)
    assert ratio <= limit, f"{name}: RMS error ratio {ratio:.2e} is above {limit:.0e}"


def compare(
    problem: Problem,
    actual: BackendResult,
    expected: BackendResult,
    limit: float,
    value_limit: float | None = None,
) -> None:
    """Every output of a backend against the reference; reports all that differ at once.

    `value_limit` is for what a backend may round to the input type: whatever is made with values.
    """
    value_limit = limit if value_limit is None else value_limit
    pairs = {
        name: (actual.tensors[name], tensor, value_limit if "norm" in name else limit)
        for name, tensor in expected.tensors.items()
        if name != "top_keys"
    }
    pairs["output"] = (actual.output, expected.output, value_limit)
    if expected.groups is not None:
        assert actual.groups is not None
        pairs["groups.output"] = (actual.groups.output, expected.groups.output, value_limit)
        pairs["groups.lse"] = (actual.groups.lse, expected.groups.lse, limit)
        for name, tensor in expected.groups.statistics.items():
            pairs[f"groups.{name}"] = (actual.groups.statistics[name], tensor, limit)
    ratios = {name: rms_ratio(got, want) for name, (got, want, _) in pairs.items()}
    wrong = {name: ratio for name, ratio in ratios.items() if not ratio <= pairs[name][2]}
    assert wrong == {}, f"RMS error ratios above {limit:.0e} (values {value_limit:.0e})"
    assert expected.tensors.keys() <= actual.tensors.keys()
    for name, tensor in actual.tensors.items():
        want = torch.int64 if name == "top_keys" else problem.compute_dtype
        assert tensor.dtype == want, name
        assert tensor.is_contiguous(), name
    if "top_keys" in expected.tensors:
        _compare_top(actual, expected, limit)


def _compare_top(actual: BackendResult, expected: BackendResult, limit: float) -> None:
    """Equal masses may stand in any order: the blocks named must have the masses given."""
    index = actual.tensors["top_keys"].cpu()
    assert all(len(set(row)) == len(row) for row in index.flatten(0, 2).tolist())
    mass = expected.tensors["block_mass"].cpu().gather(-1, index)
    assert_close(mass, expected.tensors["top_mass"], limit, "block_mass of top_keys")


def run_or_skip(backend: str, problem: Problem) -> BackendResult:
    """Runs it, or skips with the reason that the backend gives."""
    obstacle = explain_problem(problem).obstacles[backend]
    if obstacle is not None:
        pytest.skip(f"{backend}: {obstacle}")
    return load(backend).run(problem)


def check(
    backend: str,
    problem: Problem,
    limit: float = 1e-5,
    value_limit: float | None = None,
) -> BackendResult:
    """Runs the backend and compares everything with the reference."""
    actual = run_or_skip(backend, problem)
    compare(problem, actual, reference.run(problem), limit, value_limit)
    return actual


def tensors(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int = 16,
    value_dim: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value; logits with a spread of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return (
        random(batch, heads, queries, head_dim) * 2,
        random(batch, kv_heads, keys, head_dim),
        random(batch, kv_heads, keys, value_dim),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask with the sizes it is tried at; `mask(heads, queries, keys)` for a batch of 2."""

    name: str
    queries: int
    keys: int
    mask: Callable[[int, int, int], AttentionMask | None]


def _random(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _allowed(heads: int, queries: int, keys: int) -> Tensor:
    allowed = _random(2, heads, queries, keys) > 0.6
    allowed[0, :, 5] = False
    allowed[:, 1, 17:20] = False
    return allowed


def _bias_with_holes(heads: int, queries: int, keys: int) -> Tensor:
    bias = _random(1, heads, queries, keys) * 3
    return bias.masked_fill(bias < 1, -torch.inf)


def _blocky(heads: int, queries: int, keys: int) -> Tensor:
    allowed = torch.zeros(queries, keys, dtype=torch.bool)
    allowed[7:23, 11:19] = True
    return allowed


M = AttentionMask
CASES = [
    Case("none", 37, 53, lambda h, q, k: None),
    Case("causal", 41, 41, lambda h, q, k: M(causal=True)),
    Case("causal, cached keys", 29, 53, lambda h, q, k: M(causal=True)),
    Case("causal, more queries", 53, 37, lambda h, q, k: M(causal=True)),
    Case("one query", 1, 59, lambda h, q, k: M(causal=True)),
    Case("window", 53, 53, lambda h, q, k: M(causal=True, window=7)),
    Case("window of one", 37, 41, lambda h, q, k: M(causal=True, window=1)),
    Case("window both ways", 37, 41, lambda h, q, k: M(window=5)),
    Case("right padding", 37, 53, lambda h, q, k: M(key_lengths=[29, 53])),
    Case(
        "ragged",
        37,
        53,
        lambda h, q, k: M(causal=True, window=11, key_lengths=[41, 53], query_lengths=[19, 37]),
    ),
    Case(
        "more queries than keys in a row",
        37,
        41,
        lambda h, q, k: M(causal=True, key_lengths=[11, 41], query_lengths=[23, 37]),
    ),
    Case("left padding", 41, 41, lambda h, q, k: M(causal=True, key_start=[0, 13])),
    Case("empty batch row", 37, 41, lambda h, q, k: M(key_lengths=[0, 23])),
    Case("padding anywhere", 37, 53, lambda h, q, k: M(key_padding=_random(2, k) > 0.4)),
    Case("packed", 53, 53, lambda h, q, k: M(causal=True, cu_seqlens=[0, 17, 17, 23, 53])),
    Case(
        "packed by row",
        53,
        53,
        lambda h, q, k: M(window=9, cu_seqlens=[[0, 11, 40, 40], [0, 3, 29, 53]]),
    ),
    Case("prefix", 41, 41, lambda h, q, k: M(causal=True, prefix=13)),
    Case(
        "prefix by row, window, left padding",
        37,
        41,
        lambda h, q, k: M(causal=True, prefix=[5, 19], window=7, key_start=[3, 0]),
    ),
    Case("packed prefix", 53, 53, lambda h, q, k: M(causal=True, prefix=4, cu_seqlens=[0, 21, 53])),
    Case("alibi", 41, 53, lambda h, q, k: M(causal=True, alibi_slopes=_random(h))),
    Case("alibi both ways", 37, 41, lambda h, q, k: M(alibi_slopes=_random(h))),
    Case("bias", 37, 41, lambda h, q, k: M(bias=_random(2, h, q, k) * 4)),
    Case("bias of a head and key", 37, 41, lambda h, q, k: M(bias=_random(1, h, 1, k) * 4)),
    Case("bias of -inf", 37, 41, lambda h, q, k: M(causal=True, bias=_bias_with_holes(h, q, k))),
    Case("allowed", 37, 41, lambda h, q, k: M(allowed=_allowed(h, q, k))),
    Case("allowed, one block", 37, 41, lambda h, q, k: M(allowed=_blocky(h, q, k))),
    Case(
        "everything",
        37,
        53,
        lambda h, q, k: M(
            causal=True,
            window=23,
            key_start=[0, 7],
            key_padding=_random(2, k) > 0.2,
            alibi_slopes=_random(h),
            bias=_random(1, 1, q, k),
            allowed=_random(q, k, seed=5) > 0.2,
        ),
    ),
]


REPEATS = {
    *(
        "causal",
        "window of one",
        "right padding",
        "more queries than keys in a row",
        "left padding",
    ),
    *("packed", "prefix", "alibi both ways", "bias of a head and key"),
}
"""Cases in which a kernel goes no other way than in the others: a mask with the same parts, or with more."""
PART_OF_OTHERS = (
    *("causal, more queries", "causal, cached keys", "window", "empty batch row", "alibi", "bias"),
    *("padding anywhere", "packed prefix", "allowed", "bias of -inf"),
)
"""Masks whose parts are in other cases, most of them in the one with everything: where nothing goes by their kinds."""


def few(cases: Sequence[Case], *others: str) -> list[Any]:
    """Cases as parameters, those that repeat others, and the others named, for `make exhaustive`."""
    mark = pytest.mark.exhaustive
    return [
        pytest.param(case, id=name, marks=[mark] if case.name in REPEATS.union(others) else [])
        for case, name in zip(cases, ids(cases), strict=True)
    ]


def to_device(mask: AttentionMask | None, device: str) -> AttentionMask | None:
    """The mask with its tensors on the device."""
    if mask is None:
        return None
    moved = {
        field.name: part.to(device)
        for field in dataclasses.fields(mask)
        if isinstance(part := getattr(mask, field.name), Tensor)
    }
    return dataclasses.replace(mask, **moved)


def everything(problem_keys: int, queries: int, heads: int, device: str) -> Mapping[str, Any]:
    """Arguments that "all" statistics need, for a batch of 2 and at least 17 keys."""
    row, column = torch.arange(queries), torch.arange(problem_keys)
    shift = problem_keys - queries
    labels = [
        (row % 5, column % 5),
        (torch.where(row % 7 == 3, -1, row + shift - 1), torch.where(column % 3 == 1, -1, column)),
        (torch.stack((row // 9, row // 4)), torch.stack((column // 9, column // 4))),
    ]
    return {
        "statistics": "all",
        "match": [(a.to(device), b.to(device)) for a, b in labels],
        "grid": (3, 5, 2),
        "prefix": 3,
        "top_k": 2,
        "key_weights": (_random(2, heads, problem_keys, seed=9) + 0.1).to(device),
    }


def case_problem(
    case: Case,
    device: str,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Problem:
    """The problem of a case with everything asked for; `options` override."""
    sizes = (2, heads, kv_heads, case.queries, case.keys, 16, 24)
    query, key, value = tensors(*sizes, dtype=dtype, device=device)
    mask = to_device(case.mask(heads, case.queries, case.keys), device)
    known: dict[str, Any] = {"block_size": (16, 32)}
    if case.keys >= 17:
        known |= everything(case.keys, case.queries, heads, device)
    return make_problem(query, key, value, mask=mask, **(known | options))


def ids(cases: Sequence[Case]) -> list[str]:
    """Test ids of cases."""
    return [case.name.replace(", ", "-").replace(" ", "_") for case in cases]
