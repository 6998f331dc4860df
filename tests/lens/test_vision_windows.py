"""What is measured on pictures of a model in windows (Swin): within what a patch sees, beside uniform attention there."""

from itertools import product

import numpy as np
import pytest
import torch

import lens
from lens.common.results import of_kind
from tests.lens.pictures import looking_at_bright
from tests.lens.test_windows import built

GRID, WINDOW = (8, 10), 3
PATCHES = list(product(range(GRID[0]), range(GRID[1])))


@pytest.fixture(scope="module")
def even():
    """A Swin that looks evenly at all that it sees: plain and shifted windows of 3 × 3 on 8 × 10 patches."""
    root, inputs = built("swin")
    with torch.no_grad():
        for name, weight in root.named_parameters():
            if "query" in name or "q_proj" in name or "relative_position_bias" in name:
                weight.zero_()
    model = lens.load(root).part("stage0")
    return model, inputs, lens.capture(model, inputs, keep_qk=True, progress=False)


def window(place, shift):
    """Which window a row or column is in; what a shift brings round is one of its own."""
    return (place - shift) // WINDOW


def sees(shift):
    """bool [patches, patches] by plain loops, and how many keys each sees with the padding of its window."""
    seen = np.array([[[window(a, shift) == window(b, shift) for a, b in zip(p, q, strict=True)] for q in PATCHES] for p in PATCHES]).all(-1)  # fmt: skip
    padded = (9, 12)
    sizes = [[sum(window(a, shift) == window(p[axis], shift) for a in range(padded[axis])) for axis in (0, 1)] for p in PATCHES]  # fmt: skip
    return seen, np.prod(sizes, 1)


def test_even_attention_in_windows_is_uniform_attention_in_every_measure(even):
    _, _, trace = even
    away = np.abs(np.array(PATCHES)[:, None] - PATCHES)
    found = lens.vision.rings(trace)
    near = lens.vision.patch_distance(trace)
    shares = lens.vision.shapes(trace)
    for layer, shift in enumerate((0, 1)):
        seen, keys = sees(shift)
        rings = [((seen & (away.max(-1) == ring)).sum(-1) / keys).mean() for ring in range(10)]
        assert found.uniform[layer] == pytest.approx(rings)
        far = (seen * np.hypot(*np.moveaxis(away, -1, 0))).sum(-1) / seen.sum(-1)
        assert near.uniform_distance[layer] == pytest.approx(far.mean())
        assert shares.uniform[layer, 0] == pytest.approx(
            ((seen & (away[..., 0] == 0)).sum(-1) / seen.sum(-1)).mean()
        )
    for measured, uniform in (
        (found.mass, found.uniform),
        (found.weight, found.uniform_weight),
        (near.distance, near.uniform_distance),
        (shares.share, shares.uniform),
    ):
        for head in range(2):
            assert measured[:, head] == pytest.approx(uniform, rel=1e-4)
    assert "0 of 4 heads put more" in str(of_kind(found.findings(), "near")[0])
    assert "0 of 4 heads look nearer" in str(near.findings()[0])
    assert "than uniform attention (1.19 to 1.33 patches)" not in str(found.findings()[0])
    field = lens.vision.receptive_field(trace)
    assert field.distance == pytest.approx(field.alike, rel=1e-4)
    assert "not told apart from" in str(of_kind(field.findings(), "beyond")[0])
    flow = lens.vision.flow([trace, trace])
    assert flow.error < 1e-4
    for name in ("largest", "gini", "entropy", "exclusive"):
        assert getattr(flow, name) == pytest.approx(flow.uniform[name], rel=1e-4, abs=1e-6)
    assert flow.uniform["largest"] == pytest.approx(np.ones((2, 2)))
    assert [one.kind for one in flow.findings()] == ["limit"]


def test_each_window_has_a_tree_of_its_own_and_no_segment_leaves_it(even):
    _, _, trace = even
    for shift, count in ((0, 12), (1, 16)):
        seen, _ = sees(shift)
        tree = lens.vision.tree(trace, f"L{shift}")
        assert tree.windows == (tree.parents < 0).sum() == count
        assert f"falls into {count} windows" in str(tree.findings()[0])
        has = np.flatnonzero(tree.parents >= 0)
        assert seen[has, tree.parents[has]].all()
        pairs = seen & ~np.eye(80, dtype=bool)
        beside = np.abs(np.array(PATCHES)[:, None] - PATCHES).max(-1) == 1
        assert tree.adjacent_chance == pytest.approx(beside[pairs].mean())
        segments = lens.vision.cluster(trace, f"L{shift}")
        labels = segments.labels.ravel()
        assert len(np.unique(labels)) == segments.windows == count
        assert ((labels[:, None] == labels) == seen).all()
    both = lens.vision.tree(trace)  # what the second layer joins
    assert (both.windows, (both.parents < 0).sum()) == (1, 1)


def test_coding_rates_of_a_stage_are_those_of_its_own_values(even):
    model, inputs, _ = even
    found = lens.vision.coding_rate(model, inputs, progress=False)
    assert found.layers == (0, 1)
    assert np.isfinite(found.sparsity).all()
    values = []
    block = model.model.encoder.layers[0].blocks[0].attention
    part = next(one for name, one in block.named_modules() if name.endswith(("value", "v_proj")))
    hook = part.register_forward_hook(lambda *given: values.append(given[-1]))
    with torch.no_grad():
        model.model(**inputs)
    hook.remove()
    heads = values[0].reshape(-1, 2, 6).transpose(0, 1)  # of all windows
    assert found.rate[0] == pytest.approx(lens.vision.coding.rate(heads).numpy(), rel=1e-4)


def test_a_row_of_a_shifted_window_is_drawn_on_its_own_pixels():
    """Of a patch that looks at the bright one in its window: all of it lies there, and on the patch's pixels."""
    from tests.lens.pictures import with_a_bright_patch

    model = looking_at_bright("swin")
    picture, (top, bottom, left, right) = with_a_bright_patch("swin", 5, 2)
    trace = lens.capture(model, picture, keep_qk=True, progress=False).stage0
    for layer, inside, outside in ((0, (7, 0), (2, 2)), (1, (2, 4), (7, 4))):
        found = trace.overlay(f"L{layer}H1", query=inside)
        assert found.values[0, 5, 2] == pytest.approx(1, rel=1e-4)
        drawn = found.pixel_values(found.values[0])
        assert (drawn[top:bottom, left:right] > 0.99).all()
        assert drawn.sum() == pytest.approx((bottom - top) * (right - left), rel=1e-3)
        assert trace.overlay(f"L{layer}H1", query=outside).values[0, 5, 2] == 0
        looked = trace.overlay(f"L{layer}H1", key=(5, 2))
        assert looked.values[0][inside] == pytest.approx(1, rel=1e-4)
        assert looked.values[0][outside] == 0
