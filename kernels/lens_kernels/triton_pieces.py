"""One query whose keys were cut into pieces, a program each: their states merged (states.py), in one launch."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.triton_logits import LN2, LOG2E, load_rows, store_rows

TURN = tl.constexpr(16)


@triton.jit
def merge_pieces(
    parts,
    states,
    output,
    outs,
    sinks,
    heads,
    pieces,
    FEATURES: tl.constexpr,
    PAIRS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Grid: [batch x heads].

    Args:
        parts: `Rows` [batch, heads, pieces, dim], float32.
        states: `RowOutputs` of the pieces, [..., batch, heads, pieces].
        output, outs: `Rows` and `RowOutputs` of the query.
        sinks: [heads] float32, or None.
        PIECES: a power of two, at least `pieces`.
    """
    line = tl.program_id(0)
    lines = tl.num_programs(0)
    batch, head = line // heads, line % heads
    lane = tl.arange(0, PIECES)  # [PIECES]
    used = lane < pieces  # [PIECES]
    place = line.to(tl.int64) * pieces + lane  # [PIECES]
    levels = tl.load(states.lse + place, mask=used, other=float("-inf")) * LOG2E  # [PIECES]
    top = tl.max(levels, 0)
    seen = top > float("-inf")
    pivot = tl.where(seen, top, 0.0)
    total = tl.sum(tl.exp2(levels - pivot), 0)
    lse = top + tl.log2(tl.where(seen, total, 1.0))
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        higher = tl.maximum(lse, sink)
        whole = higher + tl.log2(tl.exp2(lse - higher) + tl.exp2(sink - higher))
        lse = tl.where(seen, whole, lse)
    tl.store(outs.lse + line, lse * LN2)
    lse = tl.where(seen, lse, 0.0)
    share = tl.exp2(levels - lse)  # [PIECES], 0 for a piece without keys

    if outs.max_logit is not None:
        most = tl.load(states.max_logit + place, mask=used, other=float("-inf"))  # [PIECES]
        tl.store(outs.max_logit + line, tl.max(most, 0))
    if outs.entropy is not None:
        inside = tl.load(states.entropy + place, mask=used, other=0.0)  # [PIECES]
        between = tl.where(share > 0, lse - levels, 0.0) * LN2  # [PIECES]
        tl.store(outs.entropy + line, tl.maximum(tl.sum(share * (inside + between), 0), 0.0))
    if outs.concentration is not None:
        squares = tl.load(states.concentration + place, mask=used, other=0.0)  # [PIECES]
        tl.store(outs.concentration + line, tl.sum(share * share * squares, 0))
    if outs.distance is not None:
        way = tl.load(states.distance + place, mask=used, other=0.0)  # [PIECES]
        tl.store(outs.distance + line, tl.sum(share * way, 0))
    for feature in tl.static_range(FEATURES):
        plane = (feature * lines).to(tl.int64)
        mean = tl.load(states.means + plane * pieces + place, mask=used, other=0.0)  # [PIECES]
        tl.store(outs.means + plane + line, tl.sum(share * mean, 0))
    for pair in tl.static_range(PAIRS):
        plane = (pair * lines).to(tl.int64)
        mass = tl.load(states.match_mass + plane * pieces + place, mask=used, other=0.0)  # [PIECES]
        tl.store(outs.match_mass + plane + line, tl.sum(share * mass, 0))

    acc = tl.zeros([parts.dim], tl.float32)  # [D]
    ahead = tl.arange(0, TURN)  # [TURN]
    for first in range(0, pieces, TURN):
        there = first + ahead < pieces  # [TURN]
        tile = load_rows(parts, batch, head, first, ahead, there)  # [TURN, D]
        level = tl.load(
            states.lse + line.to(tl.int64) * pieces + first + ahead,
            mask=there,
            other=float("-inf"),
        )  # [TURN]
        acc += tl.sum(tl.exp2(level * LOG2E - lse)[:, None] * tile, 0)  # [D]
    if outs.value_norm is not None:
        tl.store(outs.value_norm + line, tl.sqrt(tl.sum(acc * acc, 0)))
    lane = tl.arange(0, TURN)  # [TURN]
    store_rows(
        tl.broadcast_to(acc[None, :], [TURN, parts.dim]), output, batch, head, 0, lane, lane < 1
    )
