"""Every policy once more, pair by pair and loop by loop, from one head's q and k: slow, and easy to read.

`q` [queries, dim] and `k` [keys, dim] are float64 arrays of one causal head, as many queries as keys.
Each function returns bool [query_blocks, key_blocks].
"""

import math

import numpy as np


def probabilities(q, k):
    scores = q @ k.T / math.sqrt(q.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def blocks_of(length, size):
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def touched(pairs, rows, columns):
    """Blocks with one True pair."""
    return np.array(
        [
            [pairs[np.ix_(i, j)].any() for j in blocks_of(pairs.shape[1], columns)]
            for i in blocks_of(pairs.shape[0], rows)
        ]
    )


def seen(length, rows, columns):
    return touched(np.tri(length, dtype=bool), rows, columns)


def a_shape(q, k, size, first, last):
    pairs = np.zeros((len(q), len(k)), bool)
    for i in range(len(q)):
        for j in range(i + 1):
            pairs[i, j] = j < first or i - j < last
    return touched(pairs, *size)


def best(scores, count):
    """Positions of the `count` largest, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda at: (-scores[at], at))[: int(count)]


def fewest(scores, needed):
    """Positions of the fewest largest that reach `needed`."""
    found, total = [], 0.0
    for at in best(scores, len(scores)):
        if total >= needed or scores[at] == 0:
            break
        found.append(at)
        total += scores[at]
    return found


def no_more(scores, allowed):
    """Positions of the largest whose sum does not pass `allowed`."""
    found, total = [], 0.0
    for at in best(scores, len(scores)):
        total += scores[at]
        if total > allowed:
            break
        found.append(at)
    return found


def lines(q, k, probe):
    """Mass of each column and of each distance in the last rows."""
    p = probabilities(q, k)
    column, distance = np.zeros(len(k)), np.zeros(len(k))
    for i in range(len(q) - min(probe, len(q)), len(q)):
        for j in range(i + 1):
            column[j] += p[i, j]
            distance[i - j] += p[i, j]
    return column, distance


def vertical_slash(q, k, size, verticals, slashes, first, last, probe):
    column, distance = lines(q, k, probe)
    column[:first], distance[:last] = np.inf, np.inf
    columns = set(best(column, max(verticals, first)))
    distances = set(best(distance, max(slashes, last)))
    pairs = np.array(
        [
            [j <= i and (j in columns or i - j in distances) for j in range(len(k))]
            for i in range(len(q))
        ]
    )
    return touched(pairs, *size)


def pooled(q, k, size):
    """Softmax of mean q · mean k over the seen blocks."""
    mean_q = [q[list(rows)].mean(0) for rows in blocks_of(len(q), size[0])]
    mean_k = [k[list(rows)].mean(0) for rows in blocks_of(len(k), size[1])]
    scores = np.array(mean_q) @ np.array(mean_k).T / math.sqrt(q.shape[1])
    scores[~seen(len(q), *size)] = -np.inf
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def block_sparse(q, k, size, top):
    found, visible = pooled(q, k, size), seen(len(q), *size)
    kept = np.zeros_like(visible)
    for row in range(len(visible)):
        kept[row, best(np.where(visible[row], found[row], -1), top)] = True
    return kept & visible


def flex_prefill(q, k, size, gamma, tau, least):
    block = size[0]
    column, distance = lines(q, k, block)
    column, distance = column / min(block, len(q)), distance / min(block, len(q))
    at = blocks_of(len(k), block)
    by_column = np.array([column[list(keys)].sum() for keys in at])
    by_distance = np.array([distance[list(keys)].sum() for keys in at])
    mean_q = q[-min(block, len(q)) :].mean(0)
    guess = np.exp([mean_q @ k[list(keys)].mean(0) / math.sqrt(q.shape[1]) for keys in at])
    guess /= guess.sum()
    true = by_column / by_column.sum()
    middle = (true + guess) / 2
    divergence = (
        0.5 * (true * np.log(true / middle)).sum() + 0.5 * (guess * np.log(guess / middle)).sum()
    )
    fewest_blocks = max(1, math.ceil(least / block))
    aware = math.sqrt(divergence) < tau
    counts = []
    for mass in (column, distance):
        count = len(fewest(mass, gamma)) // block + 1
        counts.append(fewest_blocks if aware else max(count, fewest_blocks))
    by_column[0] = by_distance[0] = np.inf
    columns, bands = set(best(by_column, counts[0])), set(best(by_distance, counts[1]))
    rows = len(at)
    kept = np.array(
        [[j <= i and (j in columns or i - j in bands) for j in range(rows)] for i in range(rows)]
    )
    if aware:
        found = pooled(q, k, size).ravel()
        kept.ravel()[no_more(found, gamma * rows)] = True
    return kept & seen(len(q), *size)


def xattention(q, k, size, threshold, stride):
    tiles = math.ceil(len(q) / stride)
    pad = tiles * stride - len(q)
    q, k = (np.pad(one, ((0, pad), (0, 0))) for one in (q, k))
    scores = np.full((tiles, tiles), -np.inf)
    for r in range(tiles):
        for c in range(r + 1):
            scores[r, c] = sum(
                q[r * stride + stride - 1 - t] @ k[c * stride + t] for t in range(stride)
            ) / (math.sqrt(q.shape[1]) * stride)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    step = size[0] // stride
    rows = blocks_of(tiles, step)
    sums = np.array([[weight[np.ix_(i, j)].sum() for j in rows] for i in rows])
    kept = np.zeros((len(rows), len(rows)), bool)
    for row, values in enumerate(sums):
        kept[row, [0, row]] = True
        rest = np.where(kept[row], 0, values)
        kept[row, fewest(rest, threshold * values.sum() - values[kept[row]].sum())] = True
    return kept


def sparge(q, k, size, similarity, mass):
    def even(values, rows):
        values = values[list(rows)] / np.linalg.norm(values[list(rows)], axis=-1, keepdims=True)
        return np.mean([[a @ b for a in values] for b in values]) > similarity

    visible = seen(len(q), *size)
    even_q = [even(q, rows) for rows in blocks_of(len(q), size[0])]
    even_k = [even(k, rows) for rows in blocks_of(len(k), size[1])]
    mean_q = np.array([q[list(rows)].mean(0) for rows in blocks_of(len(q), size[0])])
    mean_k = np.array([k[list(rows)].mean(0) for rows in blocks_of(len(k), size[1])])
    scores = mean_q @ mean_k.T / math.sqrt(q.shape[1])
    kept = np.zeros_like(visible)
    for row in range(len(kept)):
        among = visible[row] & even_k
        if among.any():
            weight = np.where(among, np.exp(scores[row] - scores[row][among].max()), 0)
            weight /= weight.sum()
            kept[row, no_more(weight, mass) or best(weight, 1)] = True
        kept[row] |= ~np.array(even_k) | (not even_q[row])
    return kept & visible


def quest_bounds(q, k, page):
    found = np.zeros((len(q), math.ceil(len(k) / page)))
    for i, query in enumerate(q):
        for at, keys in enumerate(blocks_of(len(k), page)):
            inside = k[list(keys)]
            found[i, at] = sum(
                max(query[d] * inside[:, d].max(), query[d] * inside[:, d].min())
                for d in range(len(query))
            )
    return found


def quest(q, k, page, budget):
    bounds, visible = quest_bounds(q, k, page), seen(len(q), 1, page)
    kept = np.zeros_like(visible)
    for row in range(len(q)):
        kept[row, best(np.where(visible[row], bounds[row], -np.inf), max(3, budget // page))] = True
    return kept & visible


def oracle(q, k, size, top):
    p, visible = probabilities(q, k), seen(len(q), *size)
    kept = np.zeros_like(visible)
    for row, queries in enumerate(blocks_of(len(q), size[0])):
        masses = [p[np.ix_(queries, keys)].sum() for keys in blocks_of(len(k), size[1])]
        kept[row, best(np.where(visible[row], masses, -1), top)] = True
    return kept & visible


def landmark(q, k, size, top):
    """With the last key of each block."""
    visible, kept = seen(len(q), *size), np.zeros((0, 0))
    kept = np.zeros_like(visible)
    key = np.array(
        [k[keys[-1] if len(keys) == size[1] else len(k) - 1] for keys in blocks_of(len(k), size[1])]
    )
    for row, queries in enumerate(blocks_of(len(q), size[0])):
        ends = {0} | {
            j for j, keys in enumerate(blocks_of(len(k), size[1])) if set(keys) & set(queries)
        }
        scores = key @ q[list(queries)].mean(0)
        scores = [-np.inf if j in ends or not visible[row, j] else s for j, s in enumerate(scores)]
        kept[row, list(ends)] = True
        kept[row, [j for j in best(scores, top) if scores[j] > -np.inf]] = True
    return kept & visible


def native_sparse(queries, k, size, top):
    """By the mass that all heads of `queries` give the means of blocks that end before a row of blocks begins."""
    visible = seen(len(k), *size)
    kept, means = (
        np.zeros_like(visible),
        [k[list(one)].mean(0) for one in blocks_of(len(k), size[1])],
    )
    for row, places in enumerate(blocks_of(len(k), size[0])):
        own = [j for j, keys in enumerate(blocks_of(len(k), size[1])) if set(keys) & set(places)]
        mass = np.zeros(len(means))
        past = [j for j in range(len(means)) if visible[row, j] and j not in own]
        for q in queries if past else ():
            scores = [
                math.exp(q[list(places)].mean(0) @ means[j] / math.sqrt(k.shape[1])) for j in past
            ]
            mass[past] += np.array(scores) / sum(scores)
        fixed = {0, *own, max(own[0] - 1, 0)}
        others = sorted((j for j in past if j not in fixed), key=lambda j: (-mass[j], j))
        kept[row, [*fixed, *others[: max(0, top - len(fixed))]]] = True
    return kept & visible


def strided(heads, head, rows, last, stride, offset):
    step = max(1, stride // heads)
    return np.array(
        [
            [(0 <= i - j < last) or (j + head * step + offset) % stride == 0 for j in range(rows)]
            for i in range(rows)
        ]
    )


def largest_entry(q, k, size, threshold):
    p, visible = probabilities(q, k), seen(len(q), *size)
    at = [
        [p[np.ix_(i, j)].max() > threshold for j in blocks_of(len(k), size[1])]
        for i in blocks_of(len(q), size[0])
    ]
    return np.array(at) & visible


def oracle_mass(q, k, size, mass):
    p = probabilities(q, k)
    kept = np.zeros_like(seen(len(q), *size))
    for row, queries in enumerate(blocks_of(len(q), size[0])):
        shares = [p[np.ix_(queries, keys)].sum() for keys in blocks_of(len(k), size[1])]
        kept[row, fewest(np.array(shares) / sum(shares), mass)] = True
    return kept


def long_heads(q, k, v, size, top):
    """The paper's summaries; values are as wide as keys."""
    visible, scale = seen(len(q), *size), 1 / math.sqrt(q.shape[1])

    def attended(query, key, value):
        weight = np.exp(query @ key.T * scale - (query @ key.T * scale).max(-1, keepdims=True))
        return weight / weight.sum(-1, keepdims=True) @ value

    summary = []
    for keys in blocks_of(len(k), size[1]):
        inside, value = k[list(keys)], v[list(keys)]
        mean = attended(q[list(keys)], inside, value).mean(0, keepdims=True)
        summary.append(attended(mean, inside, inside)[0])
    kept = np.zeros_like(visible)
    for row, queries in enumerate(blocks_of(len(q), size[0])):
        own = {at // size[1] for at in queries}
        forced = {0} | own | {j for j in (min(own) - 1,) if j >= 0}
        kept[row, list(forced)] = True
        free = [j for j in range(len(summary)) if visible[row, j] and j not in forced]
        scores = np.array([q[list(queries)].mean(0) @ summary[j] for j in free])
        kept[row, [free[at] for at in best(scores, max(0, top - len(forced)))]] = True
    return kept & visible


def hierarchical(q, k, size, top, levels):
    """With the middle key of each chunk, one first and one last block."""
    visible = seen(len(q), *size)
    kept = np.zeros_like(visible)
    for row, queries in enumerate(blocks_of(len(q), size[0])):
        mean, left = q[list(queries)].mean(0), set(np.flatnonzero(visible[row]))
        for level in range(levels, -1, -1):
            chunk = 2**level
            among = sorted({j // chunk for j in left})
            width = size[1] * chunk
            scores = [mean @ k[min(c * width + width // 2, len(k) - 1)] for c in among]
            count = max(1, math.ceil(top / chunk)) * (2 if level else 1)
            chosen = {among[at] for at in best(scores, count)}
            left = {j for j in left if j // chunk in chosen}
        kept[row, list(left | {0} | {at // size[1] for at in queries})] = True
    return kept & visible


def routing(q, k, size, clusters, last, rounds, order):
    """`order`: places of the points, queries before keys, the first ones of which are the first centroids."""
    visible = seen(len(q), *size)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    query = unit(np.array([q[list(rows)].mean(0) for rows in blocks_of(len(q), size[0])]))
    key = unit(np.array([k[list(rows)].mean(0) for rows in blocks_of(len(k), size[1])]))
    points = np.concatenate([query, key])
    centres = points[order[:clusters]].copy()
    for _ in range(rounds):
        member = [max(range(clusters), key=lambda c: (point @ centres[c], -c)) for point in points]
        for c in range(clusters):
            inside = [point for point, own in zip(points, member, strict=True) if own == c]
            if inside:
                centres[c] = unit(np.sum(inside, 0))
    of_query, of_key = ((one @ centres.T).argmax(-1) for one in (query, key))
    near = a_shape(q, k, size, 0, last)
    return ((of_query[:, None] == of_key[None]) | near) & visible


def global_to_local(q, k, size, length, first):
    pairs = np.array(
        [
            [j <= i and (i // length == j // length or j < first) for j in range(len(k))]
            for i in range(len(q))
        ]
    )
    return touched(pairs, *size)


def pools(q, k, size):
    """Mean query of each block; mean, largest and smallest entries of the keys of each block."""
    query = [q[list(rows)].mean(0) for rows in blocks_of(len(q), size[0])]
    key = [
        (k[list(rows)].mean(0), k[list(rows)].max(0), k[list(rows)].min(0))
        for rows in blocks_of(len(k), size[1])
    ]
    return query, key


def by_place(weights, number, row, column, size):
    back = row * size[0] // size[1] - column
    power = 0 if back == 0 else int(math.log2(abs(back))) + 1 + (16 if back < 0 else 0)
    return weights["distance"][number, power] + (weights["first"][number] if column == 0 else 0)


def seer(q, k, size, weights, number):
    """Logits of one head."""
    query, key = pools(q, k, size)
    found = np.zeros((len(query), len(key)))
    for row, a in enumerate(query):
        for column, parts in enumerate(key):
            b = sum(part @ weights["key"][number, f] for f, part in enumerate(parts))
            score = (a @ weights["query"][number]) @ b / math.sqrt(q.shape[1])
            found[row, column] = score + by_place(weights, number, row, column, size)
    return found


def sparsifiner(q, k, size, weights, number):
    """The low-rank map of one head."""
    query, key = pools(q, k, size)
    down, up = weights["down"][number], weights["up"][number]
    found = np.zeros((len(query), len(key)))
    for row, a in enumerate(query):
        scores = [
            sum(down[r, j] * (a @ key[j][0]) for j in range(len(key))) / math.sqrt(q.shape[1])
            for r in range(len(down))
        ]
        low = np.exp(np.array(scores) - max(scores))
        low /= low.sum()
        for column in range(len(key)):
            found[row, column] = sum(low[r] * up[r, column] for r in range(len(up)))
    return found


def indexer(queries, keys, size, weights):
    """Logits that all heads share, from q [heads] and k [kv_heads] of a layer."""
    pooled_queries = [pools(q, keys[0], size)[0] for q in queries]
    pooled_keys = [[parts[0] for parts in pools(k, k, size)[1]] for k in keys]
    found = np.zeros((len(pooled_queries[0]), len(pooled_keys[0])))
    for row in range(found.shape[0]):
        a = np.concatenate([one[row] for one in pooled_queries])
        share = a @ weights["weight"] + weights["even"]
        for column in range(found.shape[1]):
            b = np.concatenate([one[column] for one in pooled_keys]) @ weights["key"]
            found[row, column] = by_place(weights, 0, row, column, size) + sum(
                share[j] * max(0, (a @ weights["query"][j]) @ b / math.sqrt(len(b)))
                for j in range(len(share))
            )
    return found
