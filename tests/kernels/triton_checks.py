"""What the Triton kernels must do on any device: bodies that the GPU tests and the interpreter share.

A GPU runs them at real sizes, the interpreter at small ones; so the GPU tests have run before there
is a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lens_kernels import AttentionMask, attention, explain, reference
from lens_kernels.decoding import decode
from lens_kernels.dispatch import load
from lens_kernels.problem import BackendResult, Problem
from lens_kernels.validation import make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.gradient_setting import EXPORTS, Setting
from tests.kernels.gradient_setting import compare as compare_gradients
from tests.kernels.helpers import Case, assert_close, check, everything, tensors, to_device

CAUSAL = AttentionMask(causal=True)
OWN_EXPORTS = tuple(name for name in EXPORTS if name != "block_influence")
"""Statistics of the backward pass that the kernels make; torch makes the other one."""
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-5, torch.bfloat16: 5e-5}
"""RMS error ratios of numbers made from unrounded P in float32."""
VALUE_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of whatever is made with values, which meet P rounded to the input type."""
GRADIENT_LIMITS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def full_problem(
    device: str,
    queries: int,
    keys: int,
    head_dim: int = 16,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    **options: Any,
) -> Problem:
    """A causal problem of two batch rows with every statistic; `options` override."""
    value_dim = head_dim if value_dim is None else value_dim
    sizes = (2, *heads, queries, keys, head_dim, value_dim)
    inputs = tensors(*sizes, dtype=dtype, device=device)
    known = {"mask": CAUSAL, "block_size": (16, 32), **everything(keys, queries, heads[0], device)}
    return make_problem(*inputs, **(known | options))


def surrounded(tensor: Tensor) -> Tensor:
    """The same numbers as a view into memory that is NaN on all sides of every row and head."""
    batch, heads, positions, dim = tensor.shape
    memory = tensor.new_full((batch + 2, heads + 2, positions + 6, dim + 16), torch.nan)
    view = memory[1:-1, 1:-1, 3:-3, 8:-8]
    view.copy_(tensor)
    return view


def check_surrounded(problem: Problem) -> None:
    """Nothing beside the inputs is read, and every number of an output is written.

    The caller poisons outputs (`triton_launch._poison`).
    """
    parts = {name: surrounded(getattr(problem, name)) for name in ("query", "key", "value")}
    dtype = problem.query.dtype
    check("triton", replace(problem, **parts), LIMITS[dtype], VALUE_LIMITS[dtype])


def check_gradients(
    case: Case,
    device: str,
    dtype: torch.dtype,
    *,
    block_mask: Tensor | None = None,
    **setting: Any,
) -> None:
    """The kernels' own backward pass, with its statistics, against autograd in float64."""
    found = Setting(
        case,
        through=("output", "lse"),
        of=("query", "key", "value", "sink_logits"),
        exports=OWN_EXPORTS,
        **setting,
    )
    found.tensors = {name: part.to(dtype).float() for name, part in found.tensors.items()}
    expected = found.run("reference", block_mask=block_mask)
    moved = None if block_mask is None else block_mask.to(device)
    actual = found.run("triton", device, dtype, block_mask=moved)
    compare_gradients(actual, expected, GRADIENT_LIMITS[dtype])


def check_wide_gradients(device: str, dtype: torch.dtype, dim: int, mask: str) -> None:
    """Gradients at head dims where tiles are small and products cut in pieces, with a mask.

    Args:
        mask: "window", "padding", or "blocks": a block mask with an empty row of blocks.
    """
    masks = {
        "window": AttentionMask(causal=True, window=11),
        "padding": AttentionMask(causal=True, key_padding=torch.arange(2 * 37).view(2, 37) % 5 > 0),
    }
    case = Case(mask, 19, 37, lambda h, q, k: masks.get(mask, CAUSAL))
    kept = torch.tensor([[True, False], [True, True]]).expand(2, 4, 2, 2).clone()
    kept[1, 2, 0] = False
    block_mask = kept if mask == "blocks" else None
    check_gradients(case, device, dtype, dims=(dim, dim), block_mask=block_mask)


def check_head_dim(device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    """Forward pass, LSE pass and backward pass at one head dim, at lengths that no tile divides."""
    problem = full_problem(device, 43, 67, head_dim, value_dim, dtype=dtype)
    check("triton", problem, LIMITS[dtype], VALUE_LIMITS[dtype])
    case = Case("", 37, 53, lambda h, q, k: CAUSAL)
    check_gradients(case, device, dtype, dims=(head_dim, value_dim), softcap=None)


def check_own_backward(device: str) -> None:
    """The backward pass of a plain problem is the kernels' own, and `explain` says so."""
    query, key, value = tensors(1, 2, 1, 23, 29, device=device)
    query.requires_grad_()
    said = explain(query, key, value, mask=CAUSAL, backend="triton")
    assert (said.chosen, said.gradients) == ("triton", "triton")


def run_everything(problem: Problem) -> dict[str, Tensor]:
    """Forward pass, LSE pass and backward pass, by name."""
    result = load("triton").run(problem)
    found = {"output": result.output, **result.tensors}
    leaves = [
        part.detach().clone().requires_grad_()
        for part in (problem.query, problem.key, problem.value)
    ]
    result = attention(
        *leaves,
        mask=CAUSAL,
        statistics=("lse", *OWN_EXPORTS),
        block_size=problem.block_size,
        backend="triton",
    )
    (result.output.float().square().sum() + result.statistics.lse.sum()).backward()
    found |= {name: result.statistics[name] for name in OWN_EXPORTS}
    for name, leaf in zip(("of query", "of key", "of value"), leaves, strict=True):
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


def check_repeats(problem: Problem, repeats: int) -> None:
    """Each run gives the same bits: no races, no atomics."""
    first = run_everything(problem)
    for _ in range(repeats - 1):
        again = run_everything(problem)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that torch makes inside it."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.untyped_storage().nbytes() // part.itemsize)
        return result


def check_memory(device: str, length: int, block: int, head_dim: int, dtype: torch.dtype) -> None:
    """Extra memory is O(positions * dim + blocks^2), forward and backward; nothing is N x N."""
    heads = 2
    query, key, value = (
        part.requires_grad_()
        for part in tensors(
            1, heads, 1, length, length, head_dim, head_dim, dtype=dtype, device=device
        )
    )
    names = ("lse", "entropy", "block_mass", "received", "diagonal", "top_keys", *OWN_EXPORTS)
    maps, rows = heads * (length // block) ** 2, heads * length
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Largest() as largest:
        result = attention(
            query, key, value, mask=CAUSAL, statistics=names, block_size=block, backend="triton"
        )
        result.output.float().square().sum().backward()
    allowed = max(maps, rows * head_dim)
    assert largest.numel <= 2 * allowed < heads * length * length / 8
    if device == "cuda":
        extra = torch.cuda.max_memory_allocated() - before
        # eight maps with their copies, output and gradients in two types, thirty numbers a row
        assert extra <= 4 * (16 * maps + 10 * rows * head_dim + 30 * rows)
        assert extra < heads * length * length  # one byte for each probability is more


def check_decoding(device: str, keys: int, piece: int, queries: int, dtype: torch.dtype) -> None:
    """Few queries on a long cache, in pieces and whole, against the definition."""
    inputs = tensors(2, 4, 2, queries, keys, 32, 32, dtype=dtype, device=device)
    options = {"mask": CAUSAL, "statistics": "all", "block_size": (16, 32)}
    expected = reference.run(make_problem(*inputs, **options))
    first, again = (decode(*inputs, piece=piece, backend="triton", **options) for _ in range(2))
    same = [
        torch.equal(first.statistics[name], again.statistics[name]) for name in expected.tensors
    ]
    assert all(same), "no atomics: the same bits on every run"
    for result in (attention(*inputs, backend="triton", **options), first):
        assert_close(result.output, expected.output, VALUE_LIMITS[dtype], "output")
        for name in ("lse", "entropy", "block_mass", "received", "diagonal", "top_mass", "moments"):
            assert_close(result.statistics[name], expected.tensors[name], LIMITS[dtype], name)


def check_one_query_is_cut(device: str, dtype: torch.dtype, keys: int, piece: int) -> None:
    """One query is not one program a head: each piece of the keys is one."""
    from lens_kernels import triton_backend, triton_run

    problem = full_problem(device, 1, keys, 32, dtype=dtype, heads=(2, 1))
    launched: list[tuple[Any, int]] = []
    launch = triton_run.pack.launch

    def counted(kernel: Any, number: int, *rest: Any, **more: int) -> None:
        launched.append((kernel, number))
        launch(kernel, number, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "SHORTEST", piece)
        patch.setattr(triton_run.pack, "launch", counted)
        check("triton", problem, LIMITS[dtype], VALUE_LIMITS[dtype])
    numbers = dict(launched)
    assert numbers[triton_run.forward] == 2 * 2 * -(-keys // piece)
    assert numbers[triton_run.merge_pieces] == 2 * 2
    assert (
        len(launched) == len(numbers) == 4
    )  # with the columns and the diagonals, of all pieces at once


def check_strided(device: str, dtype: torch.dtype, masked: bool) -> None:
    """Learned sinks, weights and, with `masked`, block masks that lie in memory with gaps, whole and in pieces."""
    query, key, value = tensors(2, 4, 2, 3, 67, 32, 32, dtype=dtype, device=device)
    sinks = torch.tensor([[0.5, 90.0], [-1.0, 90.0], [3.0, 90.0], [1.0, 90.0]], device=device)[:, 0]
    seed = torch.Generator().manual_seed(5)
    weights = torch.rand(67, 4, 2, generator=seed).to(device).permute(2, 1, 0)
    kept = (torch.rand(5, 1, 4, 2, generator=seed) > 0.4).to(device).permute(3, 2, 1, 0)
    options = {
        "mask": AttentionMask(causal=True, key_padding=torch.arange(2 * 67).view(2, 67) % 7 > 0),
        "statistics": ("lse", "block_weighted", "block_mass", "received", "entropy"),
        "block_size": (16, 16),
        "sink_logits": sinks,
        "key_weights": weights,
    }
    options["mask"] = to_device(options["mask"], device)
    options["block_mask"] = kept if masked else None
    expected = reference.run(make_problem(query, key, value, **options))
    for result in (
        attention(query, key, value, backend="triton", **options),
        decode(query, key, value, piece=32, backend="triton", **options),
    ):
        assert_close(result.output, expected.output, VALUE_LIMITS[dtype], "output")
        for name in options["statistics"]:
            found = result.statistics[name]
            assert_close(found, expected.tensors[name], LIMITS[dtype], name)


def check_groups(device: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    """One state per group of keys."""
    groups = (torch.arange(2 * keys, device=device) * 7 % 11 % 4).view(2, keys)
    sinks = torch.tensor([0.5, -1.0, 3.0, 12.0], device=device)
    problem = full_problem(device, queries, keys, dtype=dtype, groups=groups, sink_logits=sinks)
    result = check("triton", problem, LIMITS[dtype], VALUE_LIMITS[dtype])
    assert result.groups is not None
    assert result.groups.output.shape[0] == 4


LONE = {
    "causal": (AttentionMask(causal=True), 37, 53, (0, 0), {}),
    "window": (AttentionMask(causal=True, window=7), 37, 53, (0, 0), {}),
    "left padding": (
        AttentionMask(causal=True, key_start=[0, 5]),
        37,
        53,
        (0, 5),
        {"softcap": 2.5},
    ),
    "two loops": (CAUSAL, 150, 150, (0, 0), {"statistics": ("lse", "entropy", "prefix_mass")}),
    "two loops, no mask": (None, 37, 53, (0, 0), {"statistics": ("lse", "distance")}),
    "another key": (CAUSAL, 37, 53, (0, 3), {"statistics": ("lse", "concentration", "max_logit")}),
}
"""Mask, queries, keys, the key of each batch row that is a group of its own, and options."""


def check_lone_key(device: str, dtype: torch.dtype, name: str) -> None:
    """A key beside all others: their states and the whole, from one launch."""
    from lens_kernels import triton_run

    mask, queries, keys, alone, options = LONE[name]
    groups = torch.ones(2, keys, dtype=torch.int64, device=device)
    groups[0, alone[0]] = groups[1, alone[1]] = 0
    sinks = torch.tensor([0.5, -1.0, 3.0, 12.0], device=device)
    problem = full_problem(
        *(device, queries, keys),
        dtype=dtype,
        groups=groups,
        sink_logits=sinks,
        mask=mask,
        **options,
    )
    launched: list[Any] = []
    launch = triton_run.pack.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_run.pack,
            "launch",
            lambda kernel, *rest, **more: (launched.append(kernel), launch(kernel, *rest, **more)),
        )
        check("triton", problem, LIMITS[dtype], VALUE_LIMITS[dtype])
    # with "another key", one lies where no loop has a mask: a problem for each group
    one = name != "another key" and dtype != torch.float32
    assert (launched.count(triton_run.forward) == 1) == one


def check_block_mask(
    device: str, queries: int, keys: int, block: tuple[int, int], dtype: torch.dtype
) -> BackendResult:
    """Random blocks, some rows of them wholly empty."""
    shape = (2, 4, -(-queries // block[0]), -(-keys // block[1]))
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    kept[0, 1, 0] = False
    problem = full_problem(
        device, queries, keys, dtype=dtype, block_mask=kept.to(device), block_size=block
    )
    return check("triton", problem, LIMITS[dtype], VALUE_LIMITS[dtype])
