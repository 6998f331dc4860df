"""Runs the forward kernels of one problem: allocates outputs, launches, puts statistics together."""

# pyright: reportArgumentType=false

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lens_kernels import triton_launch as pack
from lens_kernels.problem import Problem, row_features, top_blocks
from lens_kernels.states import seen_rows
from lens_kernels.triton_configs import (
    columns_config,
    diagonals_config,
    row_config,
    short_prefix,
    split_rows,
)
from lens_kernels.triton_forward import forward
from lens_kernels.triton_lse_pass import ColumnOutputs, MapSize, columns_pass, diagonals_pass
from lens_kernels.triton_pieces import merge_pieces
from lens_kernels.triton_rows import BlockList, FirstKey, RowInputs, RowOutputs

_STATE = ("max_logit", "entropy", "concentration", "distance")
_ROWS = (*_STATE, "value_norm")
_MAPS = {
    "block_mass": 0.0,
    "block_max": 0.0,
    "block_max_logit": -math.inf,
    "block_weighted": 0.0,
}
SCRATCH_BYTES = 1 << 28
"""Of block masses that are made for `top_keys` alone, at once."""
SORT_BYTES = 1 << 25
"""Of block masses that are sorted at once, which takes several copies."""


def run_rows(
    problem: Problem, dtype: torch.dtype, apart: Tensor | None = None, piece: int | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output in `dtype`, and the statistics with numbers per query row, `lse` always.

    Args:
        apart: [batch] int32, a key of each batch row whose logits, and the state of the keys beside
            it, are made along with the rest (the third result); not with a block mask.
        piece: keys that a program takes where there is one query; not with a block mask or `apart`.
    """
    sparse = problem.block_mask is not None
    config, rows, columns = pack.tiling(problem, row_config(problem), "rows", sparse)
    tiles = pack.tiles(rows, problem.queries)
    lines = (problem.batch, problem.heads, problem.queries)
    if piece is not None:
        tiles = -(-problem.keys // piece)
        lines = (*lines[:2], tiles)
    whole = piece is None
    output = pack.new(problem, *lines, problem.value_dim, dtype=dtype if whole else torch.float32)
    names = _ROWS if whole else _STATE
    tensors = {name: pack.new(problem, *lines) for name in names if problem.wants(name)}
    tensors["lse"] = pack.new(problem, *lines)

    short = whole and short_prefix(problem)
    if short:
        tensors["prefix_mass"] = pack.new(problem, *lines)
    in_loop = problem.statistics - ({"prefix_mass"} if short else set())
    features, places = row_features(replace(problem, statistics=in_loop))
    count = features.shape[-1]
    means = pack.new(problem, count, *lines)
    pairs, query_labels, key_labels = 0, None, None
    if problem.wants("match_mass"):
        assert problem.query_labels is not None
        assert problem.key_labels is not None
        pairs = problem.query_labels.shape[-1]
        query_labels = problem.query_labels.permute(2, 0, 1).contiguous()
        key_labels = problem.key_labels.masked_fill(problem.key_labels < 0, -2)
        key_labels = key_labels.permute(2, 0, 1).contiguous()
    matches = pack.new(problem, pairs, *lines)

    beside: dict[str, Tensor] = {}
    first, others = FirstKey(*(None,) * len(FirstKey._fields)), None
    if apart is not None:
        beside = {name: pack.new(problem, *lines) for name in ("logit", "lse")}
        beside |= {name: pack.new(problem, *lines) for name in _STATE if name in tensors}
        beside["output"] = pack.new(problem, *lines, problem.value_dim)
        others = pack.rows_of(beside["output"])
        state = (beside.get(name) for name in ("logit", "lse", *_STATE))
        first = FirstKey(apart, *state)

    outs = _row_outputs(tensors, means, matches)
    pack.launch(
        forward,
        problem.batch * problem.heads * tiles,
        config,
        *pack.operands(problem),
        pack.descriptor(problem.query, rows.lanes.value),
        pack.descriptor(problem.key, columns.lanes.value),
        pack.descriptor(problem.value, columns.lanes.value),
        pack.rows_of(output),
        outs,
        RowInputs(
            features.permute(3, 0, 1, 2).contiguous() if count else None,
            query_labels,
            key_labels,
            problem.prefix if short else None,
        ),
        pack.mask(problem),
        pack.scores(problem, config),
        problem.sink_logits if whole else None,
        first,
        others,
        _block_list(problem),
        pack.shape(problem),
        rows,
        columns,
        tiles,
        piece,
        problem.batch,
        FEATURES=count,
        PAIRS=pairs,
        BM=rows.lanes.value,
        BN=columns.lanes.value,
        SPLIT=whole and split_rows(problem),
    )
    if not whole:
        output, tensors, means, matches = _merged(problem, dtype, output, outs, count, pairs)
    for name, place in places.items():
        part = means[place]
        single = name in ("prefix_mass", "mean_value_norm")
        tensors[name] = part[0] if single else part.movedim(0, -1).contiguous()
    if pairs:
        tensors["match_mass"] = matches.movedim(0, -1).contiguous()
    return output, tensors, beside


def _row_outputs(tensors: dict[str, Tensor], means: Tensor, matches: Tensor) -> RowOutputs:
    """Of row statistics by name, [features, ...] and [pairs, ...]."""
    return RowOutputs(
        tensors["lse"],
        *(tensors.get(name) for name in _ROWS),
        tensors.get("prefix_mass"),
        *(part if len(part) else None for part in (means, matches)),
    )


def _merged(
    problem: Problem, dtype: torch.dtype, parts: Tensor, outs: RowOutputs, count: int, pairs: int
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Output, row statistics, means and matches of the query from those of the pieces of its keys."""
    lines = (problem.batch, problem.heads, 1)
    output = pack.new(problem, *lines, problem.value_dim, dtype=dtype)
    tensors = {name: pack.new(problem, *lines) for name in _ROWS if problem.wants(name)}
    tensors["lse"] = pack.new(problem, *lines)
    means, matches = (pack.new(problem, number, *lines) for number in (count, pairs))
    pack.launch(
        merge_pieces,
        problem.batch * problem.heads,
        pack.Config(16, 16, 4, 1),
        pack.rows_of(parts),
        outs,
        pack.rows_of(output),
        _row_outputs(tensors, means, matches),
        problem.sink_logits,
        problem.heads,
        parts.shape[2],
        FEATURES=count,
        PAIRS=pairs,
        PIECES=pack.power(parts.shape[2]),
    )
    return output, tensors, means, matches


def _block_list(problem: Problem) -> BlockList | None:
    """The kept key blocks of each query block, ascending."""
    mask = problem.block_mask
    if mask is None:
        return None
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
    count = mask.sum(-1, dtype=torch.int32)
    height, width = mask.shape[-2:]
    batch = 0 if mask.shape[0] == 1 else mask.shape[1] * height
    head = 0 if mask.shape[1] == 1 else height
    return BlockList(order, count, batch, head, width)


def run_columns(problem: Problem, lse: Tensor) -> dict[str, Tensor]:
    """Received mass and block maps."""
    top = problem.wants("top_keys", "top_mass")
    maps = {name for name in _MAPS if problem.wants(name)} | ({"block_mass"} if top else set())
    if not maps and not problem.wants("received"):
        return {}
    found: dict[str, list[Tensor]] = {}
    lines = problem.batch * problem.heads
    step = lines
    if top and not problem.wants("block_mass"):
        per_line = 4 * problem.query_blocks * problem.key_blocks
        step = max(1, min(lines, SCRATCH_BYTES // per_line))
    count = seen_rows(lse > -math.inf, problem.block_size[0]).flatten(0, 1)
    for first in range(0, lines, step):
        part = _columns(problem, lse, maps, first, min(step, lines - first))
        for name in ("block_mass", "block_weighted"):
            if name in part:
                part[name] /= count[first : first + step, :, None]
        if top:
            found_top = _top(part["block_mass"], problem.top_k)
            part["top_keys"], part["top_mass"] = found_top
        for name, tensor in part.items():
            if problem.wants(name):
                found.setdefault(name, []).append(tensor)
    shape = (problem.batch, problem.heads)
    return {
        name: (parts[0] if len(parts) == 1 else torch.cat(parts)).unflatten(0, shape)
        for name, parts in found.items()
    }


def _top(mass: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`top_blocks` of maps [lines, ...], some lines at a time."""
    step = max(1, SORT_BYTES // (4 * mass[0].numel()))
    parts = [top_blocks(part, top_k) for part in mass.split(step)]
    keys, masses = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(masses)


def _columns(
    problem: Problem, lse: Tensor, maps: set[str], first: int, lines: int
) -> dict[str, Tensor]:
    """Of `lines` heads from `first` on: received mass, and maps of sums and maxima."""
    blocked = bool(maps) or problem.block_mask is not None
    config, rows, columns = pack.tiling(problem, columns_config(problem), "columns", blocked)
    size = MapSize(pack.pieces(rows, problem.queries), pack.pieces(columns, problem.keys))
    found = {
        name: torch.full((lines, *size), _MAPS[name], device=problem.device)
        for name in sorted(maps)
    }
    if problem.wants("received"):
        found["received"] = pack.new(problem, lines, problem.keys)
    tiles = pack.tiles(columns, problem.keys)
    pack.launch(
        columns_pass,
        lines * tiles,
        config,
        pack.rows_of(problem.query),
        pack.rows_of(problem.key),
        lse,
        ColumnOutputs(found.get("received"), *(found.get(name) for name in _MAPS)),
        problem.key_weights,
        *pack.hiding(problem, config),
        pack.query_spans(problem, rows, columns),
        pack.shape(problem),
        rows,
        columns,
        pack.tiles(rows, problem.queries),
        tiles,
        size,
        first,
    )
    for name in maps:
        found[name] = pack.pooled(found[name], rows, columns, name.startswith("block_max"))
    return found


def run_diagonals(problem: Problem, lse: Tensor) -> dict[str, Tensor]:
    """The mass at each distance."""
    if not problem.wants("diagonal"):
        return {}
    config = diagonals_config(problem)
    side = min(config.rows, pack.power(max(problem.queries, problem.keys)))
    straight = pack.straight(side)
    row_tiles, column_tiles = pack.tiles(straight, problem.queries), -(-problem.keys // side)
    first, end = _differences(problem, side, row_tiles, column_tiles)
    lines = problem.batch * problem.heads
    folded = pack.new(problem, lines, end - first, 2, side)
    blocks = (straight, straight)
    if problem.block_mask is not None:
        height, width = problem.block_size
        blocks = (
            pack.of_blocks(height, side, problem.queries),
            pack.of_blocks(width, side, problem.keys),
        )
    pack.launch(
        diagonals_pass,
        lines * (end - first),
        config,
        pack.rows_of(problem.query),
        pack.rows_of(problem.key),
        lse,
        folded,
        *pack.hiding(problem, config),
        _diagonal_spans(problem, straight, column_tiles, first, end),
        pack.shape(problem),
        *blocks,
        row_tiles,
        column_tiles,
        first,
        end - first,
        T=side,
    )
    return {"diagonal": _unfold_diagonals(problem, folded, first)}


def _differences(problem: Problem, side: int, row_tiles: int, column_tiles: int) -> tuple[int, int]:
    """Block diagonals `I - J` that hold any visible key: first, and one past the last."""
    first, end = 1 - column_tiles, row_tiles
    plan = problem.plan
    if plan.simple:  # distances in one are `offset + side * (I - J)`, give or take `side - 1`
        nearest = 0 if plan.causal else None
        if plan.window is not None:
            nearest = nearest if plan.causal else 1 - plan.window
            end = min(end, -(-(plan.window - plan.offset + side - 1) // side))
        if nearest is not None:
            first = max(first, -(-(nearest - plan.offset - side + 1) // side))
    return first, max(end, first + 1)


def _diagonal_spans(
    problem: Problem, tiles: pack.Blocks, column_tiles: int, first: int, end: int
) -> Tensor | None:
    """The query tiles in which each block diagonal holds a visible key: [batch, differences, 2].

    First one, and one past the last. None where the kernel computes it, for a simple mask.
    """
    if problem.plan.simple:
        return None
    side = tiles.lanes.value
    spans = pack.key_spans(problem, tiles)[:, None]  # [batch, 1, query tiles, 2]
    query_tile = torch.arange(spans.shape[2], device=problem.device)
    difference = torch.arange(first, end, device=problem.device)[:, None]
    key_tile = query_tile - difference  # [differences, query tiles]
    meets = (spans[..., 0] < (key_tile + 1) * side) & (spans[..., 1] > key_tile * side)
    return pack.first_and_last(meets & (key_tile >= 0) & (key_tile < column_tiles))


def _unfold_diagonals(problem: Problem, folded: Tensor, first: int) -> Tensor:
    """`diagonal` [batch, heads, distances] from [lines, block diagonals, 2, side].

    Each distance gets its mass from two neighbouring block diagonals.
    """
    lines, count, _, side = folded.shape
    line = folded.new_zeros(lines, (count + 1) * side)
    line[:, :-side] += folded[:, :, 0].flatten(1)
    line[:, side:] += folded[:, :, 1].flatten(1)
    start = problem.plan.anchor[:, 0] + first * side + 1 - side  # [batch], distance of line[0]
    distance = torch.arange(problem.distances, device=problem.device) + problem.diagonal_start
    place = distance - start[:, None]  # [batch, distances]
    inside = (place >= 0) & (place < line.shape[1])
    place = place.clamp(0, line.shape[1] - 1)[:, None].expand(-1, problem.heads, -1)
    line = line.unflatten(0, (problem.batch, problem.heads))
    return line.gather(2, place).masked_fill_(~inside[:, None], 0)
