"""Trees, segments, conserved flow and coding rates, each beside what is known without it."""

import dataclasses
import itertools

import networkx as nx
import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.vision._arborescence import arborescence, greedy_cycles
from lens.vision.coding import EPSILON2, rate
from tests.lens.pictures import looking_at_bright, planted
from tests.lens.test_vision_rings import drawn


def total(scores, root, parents):
    return sum(root[i] if p < 0 else scores[i, p] for i, p in enumerate(parents))


def is_tree(parents):
    return greedy_cycles(np.asarray(parents)) == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_arborescence_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    scores, root = random.normal(size=(4, 4)), random.normal(size=4) - 2
    found = arborescence(scores, root)
    choices = [[one for one in range(-1, 4) if one != node] for node in range(4)]
    trees = [one for one in itertools.product(*choices) if is_tree(one)]
    assert is_tree(found)
    assert total(scores, root, found) == pytest.approx(
        max(total(scores, root, one) for one in trees)
    )


def test_the_arborescence_of_many_nodes_is_as_good_as_that_of_networkx():
    random = np.random.default_rng(3)
    scores, root = random.normal(size=(23, 23)), random.normal(size=23) - 3
    graph = nx.DiGraph()
    for i in range(23):
        graph.add_edge(-1, i, weight=root[i] + 100)
        graph.add_weighted_edges_from((j, i, scores[i, j] + 100) for j in range(23) if j != i)
    best = nx.maximum_spanning_arborescence(graph).size(weight="weight") - 100 * 23
    assert total(scores, root, arborescence(scores, root)) == pytest.approx(best)


def test_circles_are_counted():
    assert greedy_cycles(np.array([1, 0, 3, 4, 2, 0, -1])) == 2
    assert greedy_cycles(np.array([-1, 0, 1, 2])) == 0


def chain(height, width, weight=0.5):
    """Every patch looks at one that was there before it: the tree is known. No patch gets enough to be a sink."""
    count = height * width
    random = np.random.default_rng(5)
    parents = np.array([-1, *(random.integers(0, node) for node in range(1, count))])
    pattern = np.full((count, count), (1 - weight) / count)
    for node, parent in enumerate(parents):
        pattern[node, parent if parent >= 0 else node] += weight
    return parents, planted(pattern[None, None], height, width)


def test_a_planted_tree_comes_back():
    parents, trace = chain(4, 5)
    found = lens.vision.tree(trace, "L0H0")
    assert found.parents.tolist() == parents.tolist()
    assert found.agreement(parents)[0] == 1
    assert found.agreement(parents)[1] < 0.5
    assert found.cycles == 1  # the root has a best parent too
    depth = [0]
    for node in range(1, 20):
        depth.append(depth[parents[node]] + 1)
    assert found.depth.tolist() == depth
    table = found.table()
    assert table["children"].sum() == 19
    assert (table["parent_row"] * 5 + table["parent_column"])[1:].tolist() == parents[1:].tolist()
    near = [max(abs(p // 5 - n // 5), abs(p % 5 - n % 5)) == 1 for n, p in enumerate(parents) if n]
    assert found.adjacent == pytest.approx(np.mean(near))
    assert len(found.plot().data) == 2
    with pytest.raises(LensError, match=r"parents must be \[20\]"):
        found.agreement(parents[:4])


def test_what_goes_to_no_patch_makes_roots_where_it_is_asked_for():
    patterns, _ = drawn(3, 3, special=1)
    patterns[..., 3, :] = 1e-9
    patterns[..., 3, 0] = 1  # patch 2 looks at [CLS] alone
    trace = planted(patterns, 3, 3, special=1)
    assert (lens.vision.tree(trace).parents < 0).sum() == 1
    sinks = lens.vision.tree(trace, roots="sink")
    assert sinks.parents[2] == -1
    alone = dataclasses.replace(
        sinks, parents=np.full(9, -1), depth=np.zeros(9, int), adjacent=np.nan
    )
    assert "every patch is a root, so none has a parent" in alone.findings()[1]
    assert "nan" not in alone.plot().layout.title.text
    with pytest.raises(LensError, match="roots must be one of"):
        lens.vision.tree(trace, roots="many")  # pyright: ignore[reportArgumentType]


def figure_on_ground(noise=0.3, seed=6):
    """Patches of a figure look at the figure, those of the ground at the ground."""
    mask = np.zeros((8, 8), bool)
    mask[2:6, 3:7] = True
    mask[1, 4] = True
    flat = mask.ravel()
    alike = (flat[:, None] == flat).astype(float)
    random = np.random.default_rng(seed)
    pattern = alike * random.uniform(1 - noise, 1 + noise, (64, 64)) + 0.01
    pattern /= pattern.sum(-1, keepdims=True)
    return mask, planted(pattern[None, None], 8, 8)


def test_a_planted_figure_is_segmented():
    mask, trace = figure_on_ground()
    found = lens.vision.cluster(trace, "L0H0")
    iou, shuffled = found.iou(mask)
    assert iou > 0.9
    assert shuffled < 0.5
    assert found.table()["patches"].tolist() == [47, 17]
    assert found.plot().data[0].z.shape == (8, 8)
    assert "2 segments" in found.findings()[0]


def test_tau_runs_from_every_patch_alone_to_one_segment():
    _, trace = figure_on_ground()
    assert lens.vision.cluster(trace, "L0H0", tau=1e-9).labels.max() == 63
    assert lens.vision.cluster(trace, "L0H0", tau=1e9).labels.max() == 0
    with pytest.raises(LensError, match="tau must be above 0, got 0"):
        lens.vision.cluster(trace, tau=0)
    for tau in (float("nan"), True):
        with pytest.raises(LensError, match=f"tau must be above 0, got {tau}"):
            lens.vision.cluster(trace, tau=tau)
    for tau in ("a", None):
        with pytest.raises(LensError, match=f"tau must be a number, got {tau!r}"):
            lens.vision.cluster(trace, tau=tau)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LensError, match=r"mask must be bool \[8, 8\] with some patch in it"):
        lens.vision.cluster(trace).iou(np.zeros((8, 8), bool))


def test_flow_is_conserved_and_is_that_of_plain_sums():
    patterns, trace = drawn(3, 4, special=1)
    found = lens.vision.flow(trace)
    assert found.error < 1e-4  # row sums of float32 logits
    one = patterns[1, 2]
    out = one.sum(0)
    chosen = one[::2].sum(0).argmax()
    assert found.largest[1, 2] == pytest.approx(one[1::2, chosen].mean() * 13, rel=1e-5)
    assert found.exclusive[1, 2] == pytest.approx((one / out).sum(-1).min(), rel=1e-5)
    pairs = np.abs(out[:, None] - out).sum() / (2 * len(out) ** 2 * out.mean())
    assert found.gini[1, 2] == pytest.approx(pairs, rel=1e-5)
    same = lens.vision.flow(planted(np.full((1, 1, 9, 9), 1 / 9), 3, 3))
    assert (same.largest[0, 0], same.entropy[0, 0]) == pytest.approx((1, 1))
    assert same.gini[0, 0] == pytest.approx(0, abs=1e-6)
    assert found.plot().data[0].z.tolist() == found.gini.tolist()


def test_coding_rates_have_their_closed_forms():
    random = torch.Generator().manual_seed(0)
    line = torch.randn(1, 8, generator=random) * torch.randn(40, 1, generator=random)
    assert float(rate(line)) == pytest.approx(3.34293, abs=1e-5)
    spread = torch.eye(8).repeat(5, 1)
    assert float(rate(spread)) == pytest.approx(18.46048, abs=1e-5)
    vectors = torch.randn(13, 8, generator=random)
    turned = vectors @ torch.linalg.qr(torch.randn(8, 8, generator=random))[0]
    assert float(rate(turned[torch.randperm(13)])) == pytest.approx(float(rate(vectors)))
    few = vectors[:5].double()
    unit = few / few.norm(dim=-1, keepdim=True)
    plain = 0.5 * torch.logdet(torch.eye(8) + 8 / (5 * EPSILON2) * unit.T @ unit)
    assert float(rate(few)) == pytest.approx(float(plain))


def test_the_coding_rate_is_that_of_the_models_own_values():
    model = lens.load("vit-digits")
    picture = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    found = lens.vision.coding_rate(model, picture, progress=False)
    assert found.rate.shape == (3, 4)
    values = {}
    pixels = torch.tensor(picture / 127.5 - 1)[None, None].float()
    modules = [m for name, m in model.model.named_modules() if name.endswith(("value", "v_proj"))]
    hooks = [
        m.register_forward_hook(lambda _, __, out, layer=layer: values.__setitem__(layer, out))
        for layer, m in enumerate(modules)
    ]
    with torch.no_grad():
        model.model(pixels)
    for hook in hooks:
        hook.remove()
    heads = values[2][0].reshape(17, 4, 12).transpose(0, 1)
    assert found.rate[2] == pytest.approx(rate(heads).numpy(), rel=1e-4)
    assert (found.lowest < found.rate).all()
    assert (found.rate < found.highest).all()
    flat = lens.vision.coding_rate(
        looking_at_bright("square"), np.zeros((24, 24, 3), np.uint8), progress=False
    )
    assert flat.sparsity[0] > 0.5  # six of eight numbers are zero there
    assert found.plot().data[1].y.tolist() == found.rate.mean(-1).tolist()
