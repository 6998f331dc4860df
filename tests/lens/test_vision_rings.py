"""Distances on the picture: rings, rows, columns, windows, receptive fields, beside loops and closed forms."""

import itertools

import numpy as np
import pytest

import lens
from lens.common.errors import LensError
from tests.lens.pictures import planted


def drawn(height, width, special=1, layers=2, heads=3, seed=0):
    length = special + height * width
    patterns = np.random.default_rng(seed).dirichlet(np.full(length, 0.3), (layers, heads, length))
    return patterns, planted(patterns, height, width, special=special)


def uniform(height, width, special):
    length = special + height * width
    return planted(np.full((2, 1, length, length), 1 / length), height, width, special=special)


def test_rings_are_those_of_plain_loops():
    patterns, trace = drawn(3, 5, special=2)
    found = lens.vision.rings(trace)
    places = list(itertools.product(range(3), range(5)))
    for layer, head in np.ndindex(2, 3):
        sums, weights = np.zeros((5, 15)), [[] for _ in range(5)]
        for p, (r, c) in enumerate(places):
            for ring in range(5):
                members = [
                    q for q, (a, b) in enumerate(places) if max(abs(a - r), abs(b - c)) == ring
                ]
                mass = sum(patterns[layer, head, 2 + p, 2 + q] for q in members)
                sums[ring, p] = mass
                if members:
                    weights[ring].append(mass / len(members))
        assert found.mass[layer, head] == pytest.approx(sums.mean(1), rel=1e-4)
        assert found.weight[layer, head] == pytest.approx([np.mean(w) for w in weights], rel=1e-4)
    assert found.mass.sum(-1) + found.elsewhere == pytest.approx(np.ones((2, 3)), rel=1e-5)
    assert (found.low <= found.mass).all()
    assert (found.mass <= found.high).all()
    table = found.table()
    assert table.columns[:4].tolist() == ["layer", "head", "name", "ring"]
    assert len(table) == 30
    assert [trace.name for trace in found.plot().data] == ["layer 0", "layer 1", "uniform"]


def test_uniform_attention_has_the_same_weight_on_every_ring():
    found = lens.vision.rings(uniform(7, 7, 1))
    assert found.weight == pytest.approx(np.full((2, 1, 7), 1 / 50), rel=1e-5)
    assert found.mass[:, 0] == pytest.approx(found.uniform, rel=1e-5)
    assert found.weight[:, 0] == pytest.approx(found.uniform_weight, rel=1e-5)
    # pairs of rows at most k apart: 7 + 2 (6 + 5 + ...), squared for both axes
    at_most = [7, 19, 29, 37, 43, 47, 49]
    pairs = np.diff([0, *(one**2 for one in at_most)])
    assert found.uniform == pytest.approx(np.stack([pairs / 49 / 50] * 2))
    inner = lens.vision.rings(uniform(9, 9, 0))
    assert inner.uniform.sum(-1) == pytest.approx([1, 1])


def test_interior_rings_have_1_8_and_16_patches():
    length = 49
    patterns = np.full((1, 1, length, length), 1e-30)
    patterns[..., 24] = 1.0  # all look at the middle
    found = lens.vision.rings(planted(patterns, 7, 7))
    assert found.mass[0, 0] * length == pytest.approx([1, 8, 16, 24, 0, 0, 0], abs=1e-4)


SHAPES = {
    "row": lambda a, b: a[0] == b[0],
    "column": lambda a, b: a[1] == b[1],
    "criss_cross": lambda a, b: a[0] == b[0] or a[1] == b[1],
    "window": lambda a, b: (a[0] // 2, a[1] // 2) == (b[0] // 2, b[1] // 2),
    "dilated": lambda a, b: (a[0] - b[0]) % 3 == 0 and (a[1] - b[1]) % 3 == 0,
}


def test_shares_of_shapes_are_those_of_plain_loops():
    patterns, trace = drawn(4, 5, special=1)
    found = lens.vision.shapes(trace, window=2, step=3)
    places = list(itertools.product(range(4), range(5)))
    for number, belongs in enumerate(SHAPES.values()):
        members = np.array([[belongs(a, b) for b in places] for a in places])
        assert found.uniform[:, number] == pytest.approx([members.mean()] * 2)
        patches = patterns[..., 1:, 1:]
        expected = ((patches * members).sum(-1) / patches.sum(-1)).mean(-1)
        assert found.share[..., number] == pytest.approx(expected, rel=1e-4)
    assert [one.kind for one in found.findings()] == list(SHAPES)
    assert found.plot().data[-1].y.tolist() == pytest.approx(found.uniform[0])
    with pytest.raises(LensError, match="window must be a positive integer, got 0"):
        lens.vision.shapes(trace, window=0)


def test_the_receptive_field_of_uniform_attention_is_half_itself_in_the_first_layer():
    found = lens.vision.receptive_field(uniform(4, 6, 0))
    assert found.distance == pytest.approx(
        [found.uniform_distance / 2, 3 * found.uniform_distance / 4]
    )
    # then 1/4 + 3/4/24 itself and 3/4/24 each other: half is 1 + 7 of 24
    assert found.half == pytest.approx([1 / 24, 8 / 24])
    assert found.reached[0].sum() == pytest.approx(1)


def test_the_receptive_field_is_rollout():
    patterns, trace = drawn(3, 4, special=1)
    found = lens.vision.receptive_field(trace)
    product = np.eye(13)
    for layer in range(2):
        product = (0.5 * (patterns[layer].mean(0) + np.eye(13))) @ product
    part = product[1:, 1:]
    part = part / part.sum(-1, keepdims=True)
    places = np.array(list(itertools.product(range(3), range(4))))
    far = np.hypot(*np.moveaxis(places[:, None] - places, -1, 0))
    assert found.distance[1] == pytest.approx((part * far).sum(-1).mean(), rel=1e-4)
    assert found.reached[1].ravel() == pytest.approx(part[6], rel=1e-4)
    assert found.plot().data[0].y.tolist() == found.distance.tolist()


def test_too_many_patches_are_refused():
    text = lens.capture(lens.load("text-lm-3l"), "It was the best of times", progress=False)
    for measure in (lens.vision.rings, lens.vision.shapes, lens.vision.receptive_field):
        with pytest.raises(LensError, match="the patches of this trace are not known"):
            measure(text)
    with pytest.raises(LensError, match="image must be 0 to 0, got 2"):
        lens.vision.rings(uniform(3, 3, 0), image=2)


@pytest.mark.parametrize(
    "name", ["rings", "shapes", "receptive_field", "tree", "cluster", "flow", "patch_distance"]
)
def test_what_is_no_trace_is_refused(name):
    for other in (None, [[uniform(3, 3, 0)]]):
        with pytest.raises(LensError, match=r"traces? must be an AttentionTrace"):
            getattr(lens.vision, name)(other)
