"""Runs the backward kernels of one problem: allocates outputs and launches."""

# pyright: reportArgumentType=false

from __future__ import annotations

import math

import torch
from torch import Tensor

from lens_kernels import triton_launch as pack
from lens_kernels.backward import Gradients, Saved, Upstream
from lens_kernels.triton_backward import GradientMaps, key_gradients, levels, query_gradients
from lens_kernels.triton_configs import (
    backward_config,
    key_gradients_together,
    split_key_gradients,
    split_query_gradients,
)
from lens_kernels.triton_lse_pass import MapSize

_GRADIENT_MAPS = ("block_attribution", "block_logit_gradient", "block_logit_gradient_abs")


def run_gradients(saved: Saved, upstream: Upstream) -> Gradients:
    """Gradients of query, key, value and learned sinks, and the statistics of the backward pass."""
    problem = saved.problem
    assert saved.output is not None
    lines = (problem.batch, problem.heads, problem.queries)
    of_output = upstream.output
    if of_output is None:
        of_output = torch.zeros_like(saved.output)
    attribution, level = pack.new(problem, *lines), pack.new(problem, *lines)
    config = pack.Config(64, 64, 4, 1)
    tiles = -(-problem.queries // config.rows)
    of_lse = None if upstream.lse is None else upstream.lse.contiguous()
    pack.launch(
        levels,
        problem.batch * problem.heads * tiles,
        config,
        pack.rows_of(saved.output),
        pack.rows_of(of_output),
        of_lse,
        attribution,
        level,
        pack.shape(problem),
        tiles,
        BM=config.rows,
    )
    of_key, of_value = _key_gradients(saved, of_output, level)
    of_query, exports = _query_gradients(saved, of_output, level)
    if problem.wants("row_attribution"):
        exports["row_attribution"] = attribution
    return Gradients(of_query, of_key, of_value, _sink_gradient(saved, level), None, exports)


def _sink_gradient(saved: Saved, level: Tensor) -> Tensor | None:
    sinks = saved.problem.sink_logits
    if "sink_logits" not in saved.wanted or sinks is None:
        return None
    seen = saved.lse > -math.inf
    share = torch.exp(sinks[:, None] - saved.lse.masked_fill(~seen, math.inf))
    return (share * level).sum((0, 2))


def _key_gradients(
    saved: Saved, of_output: Tensor, level: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of key and value, in one launch or two."""
    problem = saved.problem
    of_key = of_value = None
    if "key" in saved.wanted:
        of_key = pack.new(problem, *problem.key.shape, dtype=problem.key.dtype)
    if "value" in saved.wanted:
        of_value = pack.new(problem, *problem.value.shape, dtype=problem.value.dtype)
    together = key_gradients_together(problem)
    launches = [(of_key, of_value)] if together else [(of_key, None), (None, of_value)]
    for targets in launches:
        if any(target is not None for target in targets):
            _launch_key_gradients(saved, of_output, level, *targets)
    return of_key, of_value


def _launch_key_gradients(
    saved: Saved, of_output: Tensor, level: Tensor, of_key: Tensor | None, of_value: Tensor | None
) -> None:
    problem = saved.problem
    of = "both" if of_key is not None and of_value is not None else "key"
    config = backward_config(problem, "value" if of_key is None else of)
    sparse = problem.block_mask is not None
    config, rows, columns = pack.tiling(problem, config, "columns", sparse)
    tiles = pack.tiles(columns, problem.keys)
    pack.launch(
        key_gradients,
        problem.batch * problem.kv_heads * tiles,
        config,
        *pack.operands(problem),
        pack.rows_of(of_output),
        None if of_key is None else pack.rows_of(of_key),
        None if of_value is None else pack.rows_of(of_value),
        saved.lse,
        level,
        *pack.hiding(problem, config),
        pack.query_spans(problem, rows, columns),
        problem.scale,
        pack.shape(problem),
        rows,
        columns,
        pack.tiles(rows, problem.queries),
        tiles,
        SPLIT=split_key_gradients(problem),
    )


def _query_gradients(
    saved: Saved, of_output: Tensor, level: Tensor
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Gradient of the query, and the block maps that are asked for."""
    problem = saved.problem
    names = [name for name in _GRADIENT_MAPS if problem.wants(name)]
    if "query" not in saved.wanted and not names:
        return None, {}
    blocked = bool(names) or problem.block_mask is not None
    config = backward_config(problem, "query")
    config, rows, columns = pack.tiling(problem, config, "rows", blocked)
    of_query = None
    if "query" in saved.wanted:
        of_query = pack.new(problem, *problem.query.shape, dtype=problem.query.dtype)
    lines = problem.batch * problem.heads
    size = MapSize(pack.pieces(rows, problem.queries), pack.pieces(columns, problem.keys))
    maps = {name: level.new_zeros(lines, *size) for name in names}
    tiles = pack.tiles(rows, problem.queries)
    pack.launch(
        query_gradients,
        lines * tiles,
        config,
        *pack.operands(problem),
        pack.rows_of(of_output),
        None if of_query is None else pack.rows_of(of_query),
        GradientMaps(*(maps.get(name) for name in _GRADIENT_MAPS)),
        saved.lse,
        level,
        *pack.hiding(problem, config),
        problem.scale,
        pack.shape(problem),
        rows,
        columns,
        tiles,
        pack.tiles(columns, problem.keys),
        size,
        SPLIT=split_query_gradients(problem),
    )
    shape = (problem.batch, problem.heads)
    return of_query, {
        name: pack.pooled(tensor, rows, columns).unflatten(0, shape)
        for name, tensor in maps.items()
    }
