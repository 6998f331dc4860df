"""Backend "cpu": compiled C on the machine's own vector unit, one Q K' for output and statistics.

`attention.c` holds the method. It is compiled on first use with the machine's C compiler (2 to 4 s,
once; `build.py`) and called through ctypes. Where there is no compiler, `supports` says so, and the
torch backend serves, slower.

Why C without torch's headers, measured on 2 cores (causal, 8 heads x 64, 4,096 tokens, with
`scaled_dot_product_attention` = 1; tests/benchmarks/RESULTS.md has the current figures): this one
0.8 with row and block statistics, and 2 s to compile; a C++ extension with torch's headers and the
matrix products of its libraries 0.9 to 1.2, but 88 s to compile and tied to one torch build; numba
1.6 to 2.2, 8 s per process or a cache of pickles, and a dependency; loops of torch operations 1.2
to 17. The own matrix product reaches 110 GFLOP/s per core where the library behind torch has 91.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lens_kernels.cpu.library import Args, Operand, Plane, load, openmp_parallel
from lens_kernels.problem import BackendResult, Problem, group_statistics, row_features
from lens_kernels.types import AttentionGroups

_ROWS = ("lse", "max_logit", "entropy", "concentration", "distance")
_MAPS = ("block_mass", "block_max", "block_max_logit", "block_weighted")
_poison = False
"""Tests set it: outputs and scratch memory start as NaN, so that what is not written shows."""


def supports(problem: Problem) -> str | None:
    """None when this backend can do all of `problem`, else the reason why not.

    The first call of a process may compile the library.
    """
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device}, not on the CPU"
    if problem.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, and the inputs are {problem.query.dtype}"
    library = load()
    return library if isinstance(library, str) else None


def run(problem: Problem) -> BackendResult:
    """Computes output, LSE and the statistics asked for; see `lens_kernels.problem`.

    Raises:
        RuntimeError: when there is no library (ask `supports` first).
        MemoryError: when no thread gets its scratch memory.
    """
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"the cpu backend cannot run: {library}")
    with torch.no_grad():
        call = _Call(problem)
        if library.lens_attention(ctypes.byref(call.args)):
            raise MemoryError(
                f"no scratch memory for {problem.queries} queries and {problem.keys} keys; "
                "ask for fewer statistics or use fewer threads (torch.set_num_threads)"
            )
        return call.result()


class _Call:
    """One call: fills the struct and keeps the tensors alive whose addresses stand in it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.alive: list[Tensor] = []
        self.args = args = Args()
        self._sizes()
        args.query = Operand.of(self._rows(problem.query))
        args.key = Operand.of(self._rows(problem.key))
        args.value = Operand.of(self._rows(problem.value))
        self._mask()
        self._outputs()

    def _keep(self, tensor: Tensor) -> Tensor:
        self.alive.append(tensor)
        return tensor

    def _rows(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return self._keep(tensor if tensor.stride(-1) == 1 else tensor.contiguous())

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        """Address of the tensor's elements in order; None stays None."""
        if tensor is None:
            return None
        return self._keep(tensor.detach().to(dtype).contiguous()).data_ptr()

    def _plane(self, tensor: Tensor | None, dtype: torch.dtype) -> Plane:
        if tensor is None:
            return Plane()
        tensor = tensor.detach()
        return Plane.of(
            self._keep(tensor.view(dtype) if dtype == torch.uint8 else tensor.to(dtype))
        )

    def _sizes(self) -> None:
        problem, args = self.problem, self.args
        for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim"):
            setattr(args, name, getattr(problem, name))
        args.query_block, args.key_block = problem.block_size
        args.threads, args.openmp_parallel = torch.get_num_threads(), openmp_parallel()
        args.poison = _poison
        args.scale, args.softcap = problem.scale, problem.softcap or 0.0

    def _mask(self) -> None:
        args, plan = self.args, self.problem.plan
        args.low = self._pointer(plan.low, torch.int32)
        args.high = self._pointer(plan.high, torch.int32)
        args.anchor = self._pointer(plan.anchor[:, :1], torch.int32)
        args.slopes = self._pointer(plan.slopes, torch.float32)
        args.sinks = self._pointer(self.problem.sink_logits, torch.float32)
        args.keep = self._pointer(plan.keep, torch.bool)
        args.allowed = self._plane(plan.allowed, torch.bool)
        args.bias = self._plane(plan.bias, torch.float32)
        args.blocks = self._plane(self.problem.block_mask, torch.bool)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if _poison:
            tensor.fill_(torch.nan if dtype.is_floating_point else -1)
        return tensor

    def _outputs(self) -> None:
        problem, args = self.problem, self.args
        rows = (problem.batch, problem.heads, problem.queries)
        maps = (problem.batch, problem.heads, problem.query_blocks, problem.key_blocks)
        columns = (problem.batch, problem.heads)
        self.output = self._new(*rows, problem.value_dim)
        args.output = self.output.data_ptr()
        self.tensors = {name: self._new(*rows) for name in _ROWS if problem.wants(name)}
        self.tensors.setdefault("lse", self._new(*rows))
        self.tensors |= {name: self._new(*maps) for name in _MAPS if problem.wants(name)}
        args.key_weights = self._pointer(problem.key_weights, torch.float32)
        if problem.wants("received"):
            self.tensors["received"] = self._new(*columns, problem.keys)
        if problem.wants("diagonal"):
            self.tensors["diagonal"] = self._new(*columns, problem.distances)
            args.first_distance, args.distances = problem.diagonal_start, problem.distances
        if problem.wants("top_keys", "top_mass"):
            args.top_k = problem.top_k
            self.tensors["top_keys"] = self._new(*maps[:3], problem.top_k, dtype=torch.int64)
            self.tensors["top_mass"] = self._new(*maps[:3], problem.top_k)
        if problem.wants("match_mass"):
            self._labels()
        for name, tensor in self.tensors.items():
            setattr(args, name, tensor.data_ptr())
        self._features(rows)
        self._groups(rows)

    def _labels(self) -> None:
        problem, args = self.problem, self.args
        assert problem.query_labels is not None
        assert problem.key_labels is not None
        args.pairs = problem.query_labels.shape[-1]
        args.query_labels = self._pointer(problem.query_labels.permute(2, 0, 1), torch.int32)
        args.key_labels = self._pointer(problem.key_labels.permute(2, 0, 1), torch.int32)
        self.tensors["match_mass"] = self._new(
            problem.batch, problem.heads, problem.queries, int(args.pairs)
        )

    def _features(self, rows: tuple[int, ...]) -> None:
        features, self.columns = row_features(self.problem)
        self.args.features = features.shape[-1]
        self.args.features_of_keys = self._pointer(features.permute(3, 0, 1, 2), torch.float32)
        self.means = self._new(features.shape[-1], *rows)
        self.args.feature_means = self.means.data_ptr()

    def _groups(self, rows: tuple[int, ...]) -> None:
        self.groups = None
        if self.problem.groups is None:
            return
        count = self.args.groups = self.problem.group_count
        self.args.group_of_key = self._pointer(self.problem.groups, torch.int32)
        self.groups = AttentionGroups(
            self._new(count, *rows, self.problem.value_dim),
            self._new(count, *rows),
            {name: self._new(count, *rows) for name in group_statistics(self.problem)},
        )
        for name, tensor in self.groups.statistics.items():
            setattr(self.args, f"group_{name}", tensor.data_ptr())
        self.args.group_output = self.groups.output.data_ptr()
        self.args.group_lse = self.groups.lse.data_ptr()

    def result(self) -> BackendResult:
        problem, tensors = self.problem, dict(self.tensors)
        for name, columns in self.columns.items():
            means = self.means[columns]
            single = name in ("prefix_mass", "mean_value_norm")
            tensors[name] = means[0].contiguous() if single else means.movedim(0, -1).contiguous()
        if problem.wants("value_norm"):
            tensors["value_norm"] = self.output.norm(dim=-1)
        return BackendResult(self.output.to(problem.query.dtype), tensors, self.groups)
