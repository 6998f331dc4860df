"""Kept masses equal a naive twin on whole matrices; planted patterns are recovered."""

import numpy as np
import pytest

import lens
from lens.common.errors import LensError
from lens.heads import patterns
from lens.heads.behaviour.patterns import PatternClasses
from lens.traces.trace import AttentionTrace, TraceWriter
from tests.lens.naive import rms_ratio
from tests.lens.traces import BLOCK, LENGTH, probabilities, trace_of


def with_qk(p) -> AttentionTrace:
    """A trace whose q and k give P back: q_i = log P[i, :], k_j = the j-th unit vector, LSE 0."""
    trace = trace_of(p)
    layers, heads, length, _ = p.shape
    writer = TraceWriter()
    for layer in range(layers):
        part = trace.dataset.sel(layer=layer)
        variables = {str(n): part[n].values for n in part.data_vars if n != "visible"}
        q = np.log(np.maximum(p[layer], 1e-30)).astype(np.float32)
        k = np.broadcast_to(np.eye(length, dtype=np.float32), (heads, length, length))
        writer.add_layer(
            layer,
            {**variables, "q": q, "k": k.copy(), "lse": np.zeros((heads, length), np.float32)},
        )
    return writer.finish(
        token_ids=trace.dataset["token_id"].values.tolist(),
        tokens=trace.tokens,
        attributes=trace.attrs,
    )


def greedy(items, most):
    """Items (mass, pairs set) taken by mass per pair while their pairs fit."""
    chosen, left = [], most
    for mass, cells in sorted(items, key=lambda item: -item[0] / len(item[1])):
        if mass > 0 and len(cells) <= left:
            chosen.append(cells)
            left -= len(cells)
    return set().union(*chosen) if chosen else set()


def twin(p, budget, sink):
    """Kept mass of one head [length, length] per class, from sets of (query, key) pairs."""
    n = len(p)
    pairs = [(i, j) for i in range(n) for j in range(i + 1)]
    most = int(budget * len(pairs))
    for local in range(n, -1, -1):
        a_shape = {(i, j) for i, j in pairs if j < sink or i - j < local}
        if len(a_shape) <= most:
            break
    columns = [{(i, j) for i in range(j, n)} for j in range(n)]
    diagonals = [{(i, i - d) for i in range(d, n)} for d in range(n)]
    blocks = {}
    for i, j in pairs:
        blocks.setdefault((i // BLOCK, j // BLOCK), set()).add((i, j))

    def mass(cells):
        return sum(p[i, j] for i, j in cells)

    items = [(mass(cells), cells) for cells in (*columns, *diagonals)]
    for sixteenths in range(32, 15, -1):
        lines = greedy(items, most * sixteenths // 16)
        if len(lines) <= most:
            break
    boxes = greedy([(mass(blocks[at]), blocks[at]) for at in sorted(blocks)], most)
    return [mass(cells) / n for cells in (a_shape, lines, boxes)]


@pytest.mark.parametrize(("budget", "sink"), [(0.25, 4), (0.4, 1), (0.15, 2)])
def test_kept_masses_equal_the_twin(budget, sink):
    p = probabilities(layers=1, heads=3, length=LENGTH, seed=5)
    found = patterns(with_qk(p), budget=budget, sink=sink)
    expected = np.array([twin(head, budget, sink) for head in p[0]]).T
    assert rms_ratio(found.kept[:, 0, :, 0], expected) < 1e-5
    assert (found.density <= budget).all()
    assert (found.density > 0.7 * budget).all()


def planted():
    """[1, 4, n, n]: an A-shape, a vertical-slash, a block-sparse and a diffuse head."""
    n = 131
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    seen = j <= i
    blocks = np.array([0, 0, 1, 0, 2, 1, 3, 0, 5])[i // BLOCK] == j // BLOCK
    masks = [(j < 2) | (i - j < 3), (j == 9) | (j == 21) | (i - j == 13) | (j == i), blocks, seen]
    random = np.random.default_rng(0).uniform(0.5, 1, (n, n))
    p = np.stack([np.where(mask & seen, random, 0) for mask in masks])
    return (p / p.sum(-1, keepdims=True))[None]


def test_planted_patterns_are_recovered():
    result = patterns(with_qk(planted()))
    table = result.table()
    assert table["pattern"].tolist() == ["a_shape", "vertical_slash", "block_sparse", "diffuse"]
    assert table.loc[0, "a_shape"] == pytest.approx(1, abs=1e-5)
    assert table.loc[1, "vertical_slash"] > 0.99
    assert table.loc[1, "margin"] == pytest.approx(
        table.loc[1, "vertical_slash"] - table.loc[1, ["a_shape", "block_sparse"]].max()
    )
    best = table.loc[3, ["a_shape", "vertical_slash", "block_sparse"]].max()
    assert table.loc[3, "margin"] == pytest.approx(0.8 - best)
    assert "1 a_shape, 1 block_sparse, 1 diffuse, 1 vertical_slash" in repr(result)
    figure = result.plot()
    assert sorted(trace.name for trace in figure.data) == [
        "a-shape (1)",
        "block-sparse (1)",
        "diffuse (1)",
        "vertical-slash (1)",
    ]


def test_kept_mass_grows_with_the_budget_and_is_one_in_the_end():
    trace = with_qk(probabilities(layers=1, heads=2, length=LENGTH, seed=2))
    kept = [patterns(trace, budget=budget).kept for budget in (0.2, 0.5, 0.999)]
    assert (np.diff(np.stack(kept), axis=0) > 0).all()
    assert (kept[-1] > 0.97).all()


def test_previous_token_and_induction_heads_of_induction_2l():
    """L0H1 looks one back (A-shape); the induction heads look 24 back (a slash) or at BOS."""
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 25, seed=seed) for seed in range(3)]
    traces = [
        lens.capture(model, ids, keep_qk=True, block_size=8, progress=False) for ids in prompts
    ]
    table = patterns(traces, budget=0.25).table().set_index("name")
    assert table.loc["L0H1", "pattern"] == "a_shape"
    assert (table.loc[["L1H0", "L1H2", "L1H3"], "pattern"] == "vertical_slash").all()
    low, high = table["a_shape_low"], table["a_shape_high"]
    assert ((low <= table["a_shape"]) & (table["a_shape"] <= high)).all()


def test_what_cannot_be_classified_is_said():
    p = probabilities(layers=1, heads=2, length=LENGTH, seed=2)
    with pytest.raises(LensError, match="need q, k, which this trace lacks"):
        patterns(trace_of(p))
    with pytest.raises(LensError, match="at least one trace"):
        patterns([])
    with pytest.raises(LensError, match=r"budget must lie between 0 and 1, got 1\.5"):
        patterns(with_qk(p), budget=1.5)
    with pytest.raises(LensError, match="enough must lie between 0 and 1, got 0"):
        patterns(with_qk(p), enough=0)
    with pytest.raises(LensError, match="sink is a number of keys, got -1"):
        patterns(with_qk(p), sink=-1)
    for odd in (np.nan, -0.1, 1):  # with these every head was an A-shape
        with pytest.raises(LensError, match="tolerance must be 0 or more and below 1, got"):
            patterns(with_qk(p), tolerance=odd)
    other = with_qk(probabilities(layers=1, heads=3, length=LENGTH, seed=2))
    with pytest.raises(LensError, match="must come from one model"):
        patterns([with_qk(p), other])
    ahead = with_qk(p)
    ahead.dataset.attrs["causal"] = False
    with pytest.raises(LensError, match="analytic looks ahead"):
        patterns(ahead)
    odd = with_qk(p)
    odd.dataset["visible"] = odd.dataset["visible"] - 1
    with pytest.raises(LensError, match="neither causal nor a window"):
        patterns(odd)


def test_the_grid_shows_layers_by_their_own_numbers():
    kept = np.full((3, 3, 2, 1), 0.95)
    found = PatternClasses(kept, np.full((3, 1), 0.1), 0.1, 0.9, 0.01, 1, (1, 3, 5), "m")
    figure = found.plot()
    low, high = sorted(figure.layout.yaxis.range)
    shown = np.concatenate([one.y for one in figure.data])
    assert set(shown) == {1, 3, 5}
    assert low < shown.min() <= shown.max() < high
