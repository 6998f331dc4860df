"""Fills the structs of the library from a problem, and reads the results."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from lens_kernels.backward import Gradients, Saved, Upstream
from lens_kernels.cpu.library import Backward, Forward, Operand, Plane, load, openmp_parallel
from lens_kernels.problem import (
    BackendResult,
    Problem,
    group_statistics,
    row_features,
    statistic_shape,
)
from lens_kernels.states import seen_rows
from lens_kernels.statistics import STATISTICS
from lens_kernels.types import AttentionGroups

_ROWS = ("lse", "max_logit", "entropy", "concentration", "distance")
_MAPS = ("block_mass", "block_max", "block_max_logit", "block_weighted")
_FEW_QUERIES = 4
"""FEW in rows.h."""
_FEW_ROWS = 32
"""Of one key-value head; with more, tiles of rows multiply faster."""
_TILE = 64
"""ROWS in rows.h."""
_poison = False
"""Tests set it: outputs and scratch memory start as NaN, so that what is not written shows."""


class _Call:
    """Fills the inputs and keeps the tensors alive whose addresses stand in the struct."""

    def __init__(self, problem: Problem, args: Forward | Backward) -> None:
        self.problem, self.args = problem, args
        self.alive: list[Tensor] = []
        self._sizes()
        inputs = args.inputs
        inputs.query = Operand.of(self._rows(problem.query))
        inputs.key = Operand.of(self._rows(self._dense(problem.key)))
        inputs.value = Operand.of(self._rows(self._dense(problem.value)))
        self._mask()

    def run(self, name: str) -> None:
        """Calls the library's function of that name.

        Raises:
            RuntimeError: when there is no library (ask `supports` first).
            MemoryError: when no thread gets its scratch memory.
        """
        library = load()
        if isinstance(library, str):
            raise RuntimeError(f"the cpu backend cannot run: {library}")
        if getattr(library, f"lens_{name}")(ctypes.byref(self.args)):
            raise MemoryError(
                f"no scratch memory for {self.problem.queries} queries and {self.problem.keys} "
                "keys; ask for fewer statistics or use fewer threads (torch.set_num_threads)"
            )

    def _keep(self, tensor: Tensor) -> Tensor:
        self.alive.append(tensor)
        return tensor

    def _rows(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return self._keep(tensor if tensor.stride(-1) == 1 else tensor.contiguous())

    def _dense(self, tensor: Tensor) -> Tensor:
        """Keys or values row after row, where every tile of queries would copy them anew."""
        many = tensor.dtype == torch.float32 and self.problem.queries > _TILE
        return tensor.contiguous() if many else tensor

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
        problem, inputs = self.problem, self.args.inputs
        for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim"):
            setattr(inputs, name, getattr(problem, name))
        inputs.query_block, inputs.key_block = problem.block_size
        inputs.threads, inputs.openmp_parallel = torch.get_num_threads(), openmp_parallel()
        inputs.poison = _poison
        inputs.scale, inputs.softcap = problem.scale, problem.softcap or 0.0

    def _mask(self) -> None:
        inputs, plan = self.args.inputs, self.problem.plan
        inputs.low = self._pointer(plan.low, torch.int32)
        inputs.high = self._pointer(plan.high, torch.int32)
        inputs.anchor = self._pointer(plan.anchor[:, :1], torch.int32)
        inputs.slopes = self._pointer(plan.slopes, torch.float32)
        inputs.sinks = self._pointer(self.problem.sink_logits, torch.float32)
        inputs.keep = self._pointer(plan.keep, torch.bool)
        inputs.allowed = self._plane(plan.allowed, torch.bool)
        inputs.bias = self._plane(plan.bias, torch.float32)
        inputs.blocks = self._plane(self.problem.block_mask, torch.bool)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        if _poison:
            tensor.fill_(torch.nan if dtype.is_floating_point else -1)
        return tensor


class ForwardCall(_Call):
    """One forward pass."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, Forward())
        self.args.few = self.few = _few(problem)
        self.infinite = ctypes.c_int64()
        self.args.infinite = ctypes.addressof(self.infinite)
        self._outputs()

    def _outputs(self) -> None:
        problem, args = self.problem, self.args
        rows = (problem.batch, problem.heads, problem.queries)
        maps = (problem.batch, problem.heads, problem.query_blocks, problem.key_blocks)
        columns = (problem.batch, problem.heads)
        by_query = (problem.batch, problem.queries, problem.heads, problem.value_dim)
        self.output = self._new(*by_query).transpose(1, 2)
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
        statistics = self.problem.statistics
        if self.few and "mean_value_norm" in statistics:  # made where the values are read
            statistics = statistics - {"mean_value_norm"}
            self.tensors["mean_value_norm"] = self._new(*rows)
            self.args.mean_value_norm = self.tensors["mean_value_norm"].data_ptr()
        features, self.columns = row_features(replace(self.problem, statistics=statistics))
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
            self._new(count, *rows, self.problem.value_dim if self.problem.group_outputs else 0),
            self._new(count, *rows),
            {name: self._new(count, *rows) for name in group_statistics(self.problem)},
        )
        for name, tensor in self.groups.statistics.items():
            setattr(self.args, f"group_{name}", tensor.data_ptr())
        if self.problem.group_outputs:
            self.args.group_output = self.groups.output.data_ptr()
        self.args.group_lse = self.groups.lse.data_ptr()

    def result(self) -> BackendResult:
        problem, tensors = self.problem, dict(self.tensors)
        for name, columns in self.columns.items():
            means = self.means[columns]
            single = name in ("prefix_mass", "mean_value_norm")
            tensors[name] = means[0].contiguous() if single else means.movedim(0, -1).contiguous()
        if problem.wants("value_norm"):
            tensors["value_norm"] = self.output.norm(dim=-1).contiguous()
        output = self.output.to(problem.query.dtype)
        infinite = bool(self.infinite.value)
        return BackendResult(
            output, tensors, self.groups, infinite=infinite, looked_at_values=not self.few
        )


class BackwardCall(_Call):
    """One backward pass."""

    def __init__(self, saved: Saved, upstream: Upstream) -> None:
        problem = saved.problem
        super().__init__(problem, Backward())
        args = self.args
        args.lse = self._pointer(saved.lse, torch.float32)
        if upstream.output is not None:
            args.of_output = Operand.of(self._rows(upstream.output))
        args.of_lse = self._pointer(upstream.lse, torch.float32)
        args.of_entropy = self._pointer(upstream.entropy, torch.float32)
        args.of_received = self._pointer(upstream.received, torch.float32)
        if upstream.block_mass is not None:
            count = seen_rows(saved.lse > -torch.inf, problem.block_size[0])
            of_sum = upstream.block_mass / count[..., None]
            args.of_block_mass = self._pointer(of_sum, torch.float32)
        shapes = {
            "query": problem.query.shape,
            "key": problem.key.shape,
            "value": problem.value.shape,
            "sink_logits": (problem.batch, problem.heads, problem.queries),
        }
        self.wanted = {
            name: self._new(*shapes[name]).zero_() for name in saved.wanted if name in shapes
        }
        self.exports = {
            name: self._new(*statistic_shape(problem, name)).zero_()
            for name in sorted(problem.statistics)
            if STATISTICS[name].from_backward
        }
        for name, tensor in (self.wanted | self.exports).items():
            setattr(args, "sinks" if name == "sink_logits" else name, tensor.data_ptr())

    def result(self) -> Gradients:
        if "sink_logits" in self.wanted:
            self.wanted["sink_logits"] = self.wanted["sink_logits"].sum((0, 2))
        return Gradients(**self.wanted, exports=self.exports)


def _few(problem: Problem) -> bool:
    """Whether so few rows read each key that the keys are the lanes (decode.c)."""
    rows = problem.queries * (problem.heads // problem.kv_heads)
    plain = problem.groups is None and problem.block_mask is None
    return plain and problem.queries <= _FEW_QUERIES and rows <= _FEW_ROWS
