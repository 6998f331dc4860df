"""Kernel A: one pass over the keys with everything that is a sum or maximum along a row.

Each program owns a tile of BM queries of one head and loops over tiles of BN keys, with the running
maximum `m`, total `l` and output of online softmax (arXiv 2205.14135), in base 2:

    m' = max(m, max x)        e = x - m'        p = 2^e        a = 2^(m - m')
    l  = a l + sum p          output = a output + p v
    T  = a (T + (m - m') l) + sum p e           entropy       = ln 2 (log2 l - T / l)
    Q  = a^2 Q + sum p^2                        concentration = Q / l^2
    F  = a F + sum p f                          mean of f     = F / l

`T` is taken relative to the maximum: `lse - sum P s` would lose the digits of a large LSE. The
distance is summed from the tile's first anchor for the same reason. A learned sink joins at
the end: it takes the share `1 - mass` of every row.

Keys that no row of the tile sees are never read. With SPLIT, tiles that all rows see wholly have a
loop of their own, without a mask, after the one of the other tiles: the other way round the compiler
waits for every single matrix instruction of both. With a block mask the program walks the list of
blocks that are kept.

A key that is a group of its own, as the first one is where attention sinks, is hidden in the loops;
what they leave is the state of the other group, and the key joins as one more turn.

The mass on a short prefix is not summed in the loops, where its flags would need a register for each
key of a tile: one more tile of keys is multiplied once the LSE is known.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from lens_kernels.triton_logits import (
    LN2,
    LOG2E,
    load_rows,
    load_tile,
    logits,
    positions,
    row_ranges,
    store_rows,
)
from lens_kernels.triton_rows import key_span

PREFIX_LANES = tl.constexpr(16)


@triton.jit
def forward(
    query,
    key,
    value,
    query_tiles,
    key_tiles,
    value_tiles,
    output,
    outs,
    ins,
    mask,
    scores,
    sinks,
    first_key,
    others,
    block_list,
    shape,
    rows,
    columns,
    tiles,
    piece,
    batches,
    FEATURES: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid: [batch x heads x tiles], tiles fastest and longest (causal) first.

    Args:
        query, key, value, output: `Rows`.
        query_tiles, key_tiles, value_tiles: descriptors of the same for tiles of BM and BN positions (`load_tile`), or None.
        outs, ins: `RowOutputs`, `RowInputs`.
        mask, scores, shape: see triton_logits.
        sinks: [heads] float32, or None.
        first_key: `FirstKey`; not with a block list.
        others: `Rows` for the output of the keys beside it, float32; or None.
        block_list: `BlockList`, or None.
        rows, columns: `Blocks` of the two axes.
        tiles: query tiles, or pieces of the keys.
        piece: keys of a piece, a multiple of BN, where there is one query: each program has a piece of the keys, and
            outputs are [batch, heads, pieces]; not with a block list, a first key or SPLIT. None elsewhere.
        batches: batch rows.
        SPLIT: a loop without a mask follows; for simple masks without a window.
    """
    pid = tl.program_id(0)
    number = tiles - 1 - pid % tiles
    PIECES: tl.constexpr = piece is not None
    tile = number
    if PIECES:
        tile = 0
    head = pid // tiles % shape.heads
    batch = pid // tiles // shape.heads
    kv_head = head // shape.share

    row_first, row_ahead, row_used = positions(tile, rows, shape.queries)  # [BM]
    row = row_first + row_ahead  # [BM]
    out_first, out_rows = row_first, shape.queries
    if PIECES:
        out_first, out_rows = number, tiles
    low, high, anchor = row_ranges(mask, batch, row, shape)  # [BM]
    q = load_tile(query_tiles, query, batch, head, row_first, row_ahead, row_used)  # [BM, D]
    lane = tl.arange(0, BN)  # [BN]

    origin = tl.min(anchor, 0)  # distances are summed from here
    unit = 1.0
    if scores.folded:
        unit = scores.scale
    HIDES: tl.constexpr = mask.keep is not None or mask.allowed is not None or mask.bias is not None

    peak = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    total = tl.zeros([BM], tl.float32)  # [BM]
    surprise = tl.zeros([BM], tl.float32)  # [BM]
    squares = tl.zeros([BM], tl.float32)  # [BM]
    travel = tl.zeros([BM], tl.float32)  # [BM]
    means = ()
    for _ in tl.static_range(FEATURES):
        means = means + (tl.zeros([BM], tl.float32),)  # [BM]
    matches = ()
    labels = ()
    for pair in tl.static_range(PAIRS):
        matches = matches + (tl.zeros([BM], tl.float32),)  # [BM]
        place = (pair * batches + batch).to(tl.int64) * shape.queries + row
        labels = labels + (tl.load(ins.query_labels + place, mask=row_used, other=-1),)  # [BM]
    acc = tl.zeros([BM, value.dim], tl.float32)  # [BM, V]

    last_row = tl.minimum(row_first + BM, shape.queries) - 1
    begin, end, shared_end = key_span(low, high, mask, row_first, last_row, shape)
    if PIECES:
        begin = tl.maximum(begin, number * piece)
        end = tl.minimum(end, (number + 1) * piece)
    LIST: tl.constexpr = block_list is not None
    if LIST:
        line = batch * block_list.batch + head * block_list.head + tile // rows.parts
        listed = block_list.blocks + line.to(tl.int64) * block_list.width
        begin = 0
        end = tl.load(block_list.count + line) * columns.parts * BN
    middle = begin // BN * BN  # keys before it are masked for no row
    if SPLIT:
        middle = shared_end // BN * BN

    FIRST: tl.constexpr = first_key.key is not None
    alone = 0
    after = 0  # of the tiles that have no masked key
    if FIRST:
        alone = tl.load(first_key.key + batch)
        if SPLIT:  # key 0: its tile is one of the masked ones
            after = tl.minimum(BN, middle)
    for stretch in tl.static_range(0, 2 if SPLIT else 1):
        lower = middle - after if stretch == 0 else after
        upper = end if stretch == 0 else middle
        for turn in range(lower, upper, BN):
            start = turn
            if FIRST and SPLIT and stretch == 0:
                start = tl.where(turn < middle, 0, turn)
            if LIST:
                visit = start // BN
                block = tl.load(listed + visit // columns.parts)
                inside = visit % columns.parts * BN + lane  # [BN]
                column_first = block * columns.size + visit % columns.parts * BN
                column = column_first + lane  # [BN]
                column_used = (inside < columns.size) & (column < shape.keys)  # [BN]
            else:
                column_first = start
                column = start + lane  # [BN]
                column_used = None
                if stretch == 0:
                    column_used = column < shape.keys  # [BN]
            k = load_tile(
                key_tiles, key, batch, kv_head, column_first, lane, column_used
            )  # [BN, D]
            products = tl.dot(q, tl.trans(k), input_precision=scores.precision)  # [BM, BN]
            x = logits(
                products,
                row[:, None],
                column[None, :],
                low[:, None],
                high[:, None],
                anchor[:, None],
                mask,
                scores,
                batch,
                head,
                shape,
                stretch == 0,
            )  # [BM, BN]
            if LIST:
                x = tl.where(column_used[None, :], x, float("-inf"))  # [BM, BN]
            if FIRST and stretch == 0:
                x = tl.where(column[None, :] == alone, float("-inf"), x)  # [BM, BN]

            raised = tl.maximum(peak, tl.max(x, 1) * unit)  # [BM]
            pivot = raised  # [BM]
            if stretch == 0 or HIDES:
                pivot = tl.where(raised == float("-inf"), 0.0, raised)  # [BM]
            e = x * unit - pivot[:, None]  # [BM, BN]
            p = tl.exp2(e)  # [BM, BN]
            decay = tl.exp2(peak - pivot)  # [BM]
            mass = tl.sum(p, 1)  # [BM]
            if outs.entropy is not None:
                lift = tl.where(total > 0, peak - pivot, 0.0)  # [BM]
                bits = e  # [BM, BN]
                if stretch == 0 or HIDES:
                    bits = tl.where(p > 0, e, 0.0)  # [BM, BN]
                surprise = decay * (surprise + lift * total) + tl.sum(p * bits, 1)  # [BM]
            if outs.concentration is not None:
                squares = decay * decay * squares + tl.sum(p * p, 1)  # [BM]
            if outs.distance is not None:
                behind = (origin - column).to(tl.float32)  # [BN]
                travel = decay * travel + tl.sum(p * behind[None, :], 1)  # [BM]
            new_means = ()
            for feature in tl.static_range(FEATURES):
                plane = (feature * batches + batch) * (shape.heads // shape.share) + kv_head
                numbers = tl.load(
                    ins.features + plane.to(tl.int64) * shape.keys + column,
                    mask=column_used,
                    other=None if column_used is None else 0.0,
                )  # [BN]
                sums = tl.sum(p * numbers[None, :], 1)  # [BM]
                new_means = new_means + (decay * means[feature] + sums,)
            means = new_means
            new_matches = ()
            for pair in tl.static_range(PAIRS):
                names = tl.load(
                    ins.key_labels + (pair * batches + batch).to(tl.int64) * shape.keys + column,
                    mask=column_used,
                    other=None if column_used is None else -2,
                )  # [BN]
                equal = labels[pair][:, None] == names[None, :]  # [BM, BN]
                sums = tl.sum(tl.where(equal, p, 0.0), 1)  # [BM]
                new_matches = new_matches + (decay * matches[pair] + sums,)
            matches = new_matches
            total = decay * total + mass  # [BM]
            peak = raised  # [BM]

            v = load_tile(
                value_tiles, value, batch, kv_head, column_first, lane, column_used
            )  # [BN, V]
            acc = acc * decay[:, None]  # [BM, V]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=scores.precision)  # [BM, V]

    out_row = out_first + row_ahead  # [BM]
    line = (batch * shape.heads + head).to(tl.int64) * out_rows + out_row  # [BM]
    if FIRST:
        # the state of all the others
        seen = total > 0  # [BM]
        inverse = tl.where(seen, 1 / tl.where(seen, total, 1.0), 0.0)  # [BM]
        level = tl.log2(tl.where(seen, total, 1.0))  # [BM]
        beside = acc * inverse[:, None]  # [BM, V]
        store_rows(beside, others, batch, head, row_first, row_ahead, row_used)
        tl.store(first_key.lse + line, (peak + level) * LN2, mask=row_used)
        if outs.max_logit is not None:
            tl.store(first_key.max_logit + line, peak * LN2, mask=row_used)
        if outs.entropy is not None:
            entropy = tl.maximum(level - surprise * inverse, 0.0) * LN2  # [BM]
            tl.store(first_key.entropy + line, entropy, mask=row_used)
        if outs.concentration is not None:
            tl.store(first_key.concentration + line, squares * inverse * inverse, mask=row_used)
        if outs.distance is not None:
            way = (travel + (anchor - origin).to(tl.float32) * total) * inverse  # [BM]
            tl.store(first_key.distance + line, way, mask=row_used)

        # and the key itself, as one more turn of the loop
        lane = tl.arange(0, PREFIX_LANES)  # [BN]
        column = alone + lane  # [BN]
        column_used = column == alone  # [BN]
        k = load_rows(key, batch, kv_head, alone, lane, column_used)  # [BN, D]
        score = logits(
            tl.dot(q, tl.trans(k), input_precision=scores.precision),
            row[:, None],
            column[None, :],
            low[:, None],
            high[:, None],
            anchor[:, None],
            mask,
            scores,
            batch,
            head,
            shape,
            True,
        )  # [BM, BN]
        score = tl.max(tl.where(column_used[None, :], score, float("-inf")), 1) * unit  # [BM]
        tl.store(first_key.logit + line, score * LN2, mask=row_used)
        raised = tl.maximum(peak, score)  # [BM]
        pivot = tl.where(raised == float("-inf"), 0.0, raised)  # [BM]
        e = score - pivot  # [BM]
        p = tl.exp2(e)  # [BM]
        decay = tl.exp2(peak - pivot)  # [BM]
        lift = tl.where(seen, peak - pivot, 0.0)  # [BM]
        surprise = decay * (surprise + lift * total) + p * tl.where(p > 0, e, 0.0)  # [BM]
        squares = decay * decay * squares + p * p  # [BM]
        travel = decay * travel + p * (origin - alone).to(tl.float32)  # [BM]
        new_means = ()
        for feature in tl.static_range(FEATURES):
            plane = (feature * batches + batch) * (shape.heads // shape.share) + kv_head
            number = tl.load(ins.features + plane.to(tl.int64) * shape.keys + alone)
            new_means = new_means + (decay * means[feature] + p * number,)
        means = new_means
        new_matches = ()
        for pair in tl.static_range(PAIRS):
            name = tl.load(
                ins.key_labels + (pair * batches + batch).to(tl.int64) * shape.keys + alone
            )
            hit = tl.where(labels[pair] == name, p, 0.0)  # [BM]
            new_matches = new_matches + (decay * matches[pair] + hit,)
        matches = new_matches
        total = decay * total + p  # [BM]
        peak = raised  # [BM]
        v = load_rows(value, batch, kv_head, alone, lane, column_used)  # [BN, V]
        of_key = tl.sum(v.to(tl.float32), 0)  # [V], the other rows are 0
        acc = acc * decay[:, None] + p[:, None] * of_key[None, :]  # [BM, V]

    seen = total > 0  # [BM]
    level = tl.log2(tl.where(seen, total, 1.0))  # [BM]
    lse = peak + level  # [BM], in base 2
    kept = tl.zeros([BM], tl.float32)  # [BM], log2 of the real keys' share of the row
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        top = tl.maximum(lse, sink)  # [BM]
        whole = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink - top))  # [BM]
        kept = tl.where(seen, lse - whole, 0.0)  # [BM]
        lse = tl.where(seen, whole, lse)  # [BM]
    share = tl.exp2(kept)  # [BM]
    factor = tl.where(seen, share / tl.where(seen, total, 1.0), 0.0)  # [BM]
    acc = acc * factor[:, None]  # [BM, V]
    store_rows(acc, output, batch, head, out_first, row_ahead, row_used)

    tl.store(outs.lse + line, lse * LN2, mask=row_used)
    if outs.prefix_mass is not None:
        at = tl.where(seen, lse, float("inf"))  # [BM]
        lane = tl.arange(0, PREFIX_LANES)  # [BN]
        early = tl.zeros([BM], tl.float32)  # [BM]
        for start in range(0, tl.minimum(ins.prefix, end), PREFIX_LANES):
            column = start + lane  # [BN]
            column_used = column < ins.prefix  # [BN]
            k = load_rows(key, batch, kv_head, start, lane, column_used)  # [BN, D]
            x = logits(
                tl.dot(q, tl.trans(k), input_precision=scores.precision),
                row[:, None],
                column[None, :],
                low[:, None],
                high[:, None],
                anchor[:, None],
                mask,
                scores,
                batch,
                head,
                shape,
                True,
            )  # [BM, BN]
            x = tl.where(column_used[None, :], x, float("-inf"))  # [BM, BN]
            early += tl.sum(tl.exp2(x * unit - at[:, None]), 1)  # [BM]
        tl.store(outs.prefix_mass + line, early, mask=row_used)
    if outs.max_logit is not None:
        tl.store(outs.max_logit + line, peak * LN2, mask=row_used)
    if outs.entropy is not None:
        bits = level - surprise / tl.where(seen, total, 1.0) - kept  # [BM]
        entropy = tl.where(seen, share * bits * LN2, 0.0)  # [BM]
        tl.store(outs.entropy + line, tl.maximum(entropy, 0.0), mask=row_used)
    if outs.concentration is not None:
        tl.store(outs.concentration + line, squares * factor * factor, mask=row_used)
    if outs.distance is not None:
        travel += (anchor - origin).to(tl.float32) * total  # [BM]
        tl.store(outs.distance + line, travel * factor, mask=row_used)
    if outs.value_norm is not None:
        tl.store(outs.value_norm + line, tl.sqrt(tl.sum(acc * acc, 1)), mask=row_used)
    for feature in tl.static_range(FEATURES):
        plane = (feature * batches + batch) * shape.heads + head
        place = plane.to(tl.int64) * out_rows + out_row  # [BM]
        tl.store(outs.means + place, means[feature] * factor, mask=row_used)
    for pair in tl.static_range(PAIRS):
        plane = (pair * batches + batch) * shape.heads + head
        place = plane.to(tl.int64) * out_rows + out_row  # [BM]
        tl.store(outs.match_mass + place, matches[pair] * factor, mask=row_used)
