"""What is said of pictures is a conclusion: each sentence on attention of which it is true, and on some of which it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens.stats import over_units
from lens.stats.grouping import Groups
from lens.vision.coding import CodingRate, _ends, rate
from lens.vision.patterns import Grouping, PatternSummary
from tests.lens.pictures import planted

SIDE = 6
COUNT = SIDE * SIDE
UNIFORM = np.full((COUNT, COUNT), 1 / COUNT)
ROWS, COLUMNS = np.divmod(np.arange(COUNT), SIDE)
NEAR = np.maximum(abs(ROWS[:, None] - ROWS), abs(COLUMNS[:, None] - COLUMNS)) <= 1


def looking(where, share=0.9):
    """[patches, patches]: a share of every row lies evenly on the patches `where` [patches, patches], the rest on all."""
    weights = where / where.sum(-1, keepdims=True)
    return share * weights + (1 - share) / COUNT


def trace_of(*layers):
    """A trace of one head in each layer."""
    return planted(np.stack(layers)[:, None], SIDE, SIDE)


FAR = looking(~NEAR)
HOME = looking(NEAR)
OWN_ROW = looking(ROWS[:, None] == ROWS)
OWN_COLUMN = looking(COLUMNS[:, None] == COLUMNS)


def said(result, kind):
    (sentence,) = [one for one in result.findings() if one.kind == kind]
    return str(sentence)


def test_how_many_heads_look_nearby_and_whether_that_changes():
    assert "2 of 2 heads put more" in said(lens.vision.rings(trace_of(HOME, HOME)), "near")
    assert "0 of 2 heads put more" in said(lens.vision.rings(trace_of(FAR, UNIFORM)), "near")
    for layers, goes in (
        ((UNIFORM, HOME), "rises"),
        ((HOME, FAR), "falls"),
        ((HOME, HOME), "is not told to change"),
    ):
        found = lens.vision.rings(trace_of(*layers))
        assert f"its neighbours {goes} from layer 0" in said(found, "trend")
        assert found.near[:, 0] == pytest.approx(found.mass[:, :, :2].sum(-1).mean(1))
        assert (found.near[:, 1] <= found.near[:, 0]).all()
        assert (found.near[:, 0] <= found.near[:, 2]).all()


def test_mass_nearby_is_compared_patch_by_patch_and_as_a_sum():
    """Patches that differ widely, and each puts a little more nearby in the second layer."""
    share = np.where(np.arange(COUNT) < COUNT // 2, 0.2, 0.8)[:, None]
    layers = [near * HOME + (1 - near) * FAR for near in (share, share + 0.05)]
    found = lens.vision.rings(trace_of(*layers))
    assert found.near[0, 2] > found.near[1, 1]  # the intervals overlap
    assert "its neighbours rises from layer 0" in said(found, "trend")
    own = looking(np.eye(COUNT, dtype=bool), 0.3)
    around = looking(NEAR & ~np.eye(COUNT, dtype=bool), 0.3)
    one = lens.vision.rings(trace_of(np.where(np.arange(COUNT)[:, None] < COUNT // 2, own, around)))
    assert (
        one.near_low > one.low[..., :2].sum(-1) + 0.005
    ).all()  # what one ring takes the other loses


def test_which_shape_a_head_keeps_to():
    for pattern, shape, other in ((OWN_ROW, "row", "column"), (OWN_COLUMN, "column", "row")):
        found = lens.vision.shapes(trace_of(pattern))
        assert "1 of 1 heads above uniform attention (16.7%)" in said(found, shape)
        assert "0 of 1 heads above" in said(found, other)
        assert "most L0H0 with 91.7% [91.7%, 91.7%]." in said(found, shape)
    assert "0 of 1 heads above" in said(lens.vision.shapes(trace_of(FAR)), "window")


def test_how_far_heads_look():
    assert "2 of 2 heads look nearer" in said(
        lens.vision.patch_distance(trace_of(HOME, HOME)), "distance"
    )
    assert "0 of 1 heads look nearer" in said(lens.vision.patch_distance(trace_of(FAR)), "distance")
    assert said(lens.vision.patch_distance(trace_of(FAR)), "distance").endswith("and 1 farther.")


def test_whether_parents_are_neighbours():
    """Near ones in one tree, in the other each two rows and two columns away at least."""
    random = np.random.default_rng(0)
    jitter = random.uniform(0.5, 1.5, (COUNT, COUNT))
    for where, beside in (
        (NEAR, "more than"),
        (~NEAR, "fewer than"),
        (np.ones_like(NEAR), "not told from"),
    ):
        found = lens.vision.tree(trace_of(looking(where * jitter)), "L0H0")
        assert f"direct neighbours, {beside} the 17.5% of chance" in said(found, "adjacent")


def test_how_many_segments_there_are():
    halves = looking(COLUMNS[:, None] // 3 == COLUMNS // 3)
    assert "2 segments" in said(lens.vision.cluster(trace_of(halves)), "segments")
    assert "1 segments" in said(lens.vision.cluster(trace_of(UNIFORM)), "segments")


def test_how_unequal_keys_are():
    one_key = np.zeros((COUNT, COUNT))
    one_key[:, 7] = 1
    sink = looking(one_key, 1 - 1e-9)
    both = [trace_of(UNIFORM, sink), trace_of(UNIFORM, looking(one_key, 0.8))]
    assert "Of fewer than 5 pictures (here 2)" in said(lens.vision.flow(both), "limit")
    found = lens.vision.flow(3 * both)
    assert (
        "In 1 of 2 heads rows have a key in common (0.1 by chance), most in L1H0: it receives 32.5"
        in said(found, "flow")
    )
    assert "more unequal in layer 1 than in layer 0: Gini 0.88 and 0.00" in said(found, "rises")
    assert "(uniform attention 0.00 and 0.00)" in said(found, "rises")
    turned = [trace_of(one, UNIFORM) for one in (sink, looking(one_key, 0.8))]
    back = lens.vision.flow(3 * turned)
    assert "less unequal in layer 1 than in layer 0" in said(back, "rises")


def test_nothing_is_said_of_flow_where_uniform_attention_explains_it():
    """Rows that have nothing in common: some key of 36 receives most all the same, 1.7 times the mean here."""
    random = np.random.default_rng(4)
    pictures = [trace_of(*random.dirichlet(np.full(COUNT, 0.3), (2, COUNT))) for _ in range(6)]
    found = lens.vision.flow(pictures)
    for layer in range(2):
        whole = [one.tile(layer, 0, (0, COUNT), (0, COUNT)).sum(0).max() for one in pictures]
        assert np.mean(whole) > 1.5
        assert found.low["largest"][layer, 0] < 1
    assert [one.kind for one in found.findings()] == ["limit"]
    assert "not told apart from uniform attention" in str(found.findings()[0])
    alone = lens.vision.flow(pictures[0])
    assert np.isnan(alone.low["largest"]).all()
    assert "nothing is said of flow" in said(alone, "limit")
    assert found.table()["largest_uniform"].tolist() == pytest.approx([1, 1])


def test_where_most_lies_and_on_how_few_patches():
    one_key = np.zeros((COUNT, COUNT))
    one_key[:, 7] = 1
    sharp, flat = (trace_of(one).overlay("L0H0") for one in (looking(one_key, 0.5), UNIFORM))
    assert "the patch (1, 1), 18.5 times" in said(sharp, "strongest")
    assert "no patch stands out from uniform attention" in said(flat, "strongest")
    assert "1 of 36 patches hold half" in said(sharp, "half")
    assert "18 of 36 patches hold half" in said(flat, "half")
    assert "0.0% lies on no patch shown" in said(flat, "elsewhere")


def test_what_can_have_reached_a_patch():
    spread = said(lens.vision.receptive_field(trace_of(*[UNIFORM] * 3)), "field")
    kept = said(
        lens.vision.receptive_field(trace_of(*[looking(np.eye(COUNT), 1 - 1e-9)] * 3)), "field"
    )
    assert "0.00 patches away on average after layer 0 and 0.00 after layer 2" in kept
    assert "after layer 2 (all patches alike" in spread
    assert "0.00 after layer 2" not in spread


@pytest.mark.parametrize(
    ("layers", "told"),
    [([UNIFORM] * 3, "not told apart from"), ([HOME] * 2, "nearer than"), ([FAR], "farther than")],
)
def test_whether_that_is_what_uniform_attention_reaches(layers, told):
    """Beside the same rollout of uniform attention, by hand."""
    found = lens.vision.receptive_field(trace_of(*layers))
    assert f"After layer {len(layers) - 1} that is {told} what" in said(found, "beyond")
    step = np.linalg.matrix_power((UNIFORM + np.eye(COUNT)) / 2, len(layers))
    far = np.hypot(ROWS[:, None] - ROWS, COLUMNS[:, None] - COLUMNS)
    assert found.alike[-1] == pytest.approx((step * far).sum(-1).mean())
    assert (found.low <= found.distance).all()
    assert (found.distance <= found.high).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            (0.2, 0.4),
            "The coding rate rises from first to last layer: +0.20 to +0.40 nats over 5 prompts.",
        ),
        ((-0.4, -0.2), "The coding rate falls"),
        ((-0.1, 0.2), "The coding rate is not told apart from no change"),
        ((np.nan, np.nan), "Of one prompt the change"),
    ],
)
def test_whether_the_coding_rate_changes(change, told):
    found = CodingRate(np.ones((2, 3)), change, np.zeros(2), 0.5, 2.0, n=5, layers=(0, 1))
    assert said(found, "change").startswith(told)


def test_few_tokens_spread_over_as_many_directions_as_they_are():
    vit, digit = lens.load("vit-digits"), np.eye(8, dtype=np.uint8) * 255
    found = lens.vision.coding_rate(vit, digit, progress=False)
    size = vit.info.head_dim
    count = lens.capture(vit, digit, progress=False).length
    most = min(count, size)
    even = torch.eye(size)[torch.arange(count) % most]
    assert found.lowest == pytest.approx(float(rate(torch.ones(count, size))))
    assert found.highest == pytest.approx(float(rate(even)), rel=0.02)  # 17 tokens do not divide
    assert _ends(5, 64)[1] == pytest.approx(float(rate(torch.eye(64)[:5])))
    assert _ends(12, 4)[1] == pytest.approx(float(rate(torch.eye(4).repeat(3, 1))))


def test_that_change_is_over_prompts():
    model, pictures = lens.load("vit-digits"), np.random.default_rng(0).random((3, 8, 8)) * 255
    pictures = [one.astype(np.uint8) for one in pictures]
    several = lens.vision.coding_rate(model, pictures, progress=False)
    alone = [lens.vision.coding_rate(model, one, progress=False) for one in pictures]
    gained = [float((one.rate[-1] - one.rate[0]).mean()) for one in alone]
    expected = over_units(np.array(gained), np.ones(3), 0)
    assert list(several.change) == pytest.approx([float(end) for end in expected])
    assert np.isnan(alone[0].change).all()


def of_labels(labels, best=0.5):
    return Groups(labels, np.empty((0, 3)), 0.5, np.ones(3), best, np.full(20, 0.2))


@pytest.mark.parametrize(("sizes", "alone"), [((60, 40), False), ((95, 5), True)])
def test_one_pattern_that_holds_nearly_all_is_said_to_tell_few_apart(sizes, alone):
    labels = np.repeat([0, 1], sizes)
    one = Grouping("autoencoder", np.zeros((100, 2)), 0.1, of_labels(labels), np.zeros((2, 8, 8)))
    picture, layer, head = np.arange(100) % 2, np.arange(100) // 20, np.arange(100) // 2 % 10
    found = said(PatternSummary(one, one, picture, layer, head, 8), "groups")
    assert found.endswith("One holds 95%: these groups tell few maps apart.") == alone
    assert ("these groups tell few" in found) == alone
    assert "fall into 2 patterns" in found
    none = replace(one, groups=of_labels(labels, best=0.1))
    other = said(PatternSummary(none, none, picture, layer, head, 8), "groups")
    assert "are in no groups that are told apart" in other
    assert (
        "0.1 standard deviations over the mean of these and of single normal clouds, not above the 0.2"
        in other
    )


def test_heads_that_keep_one_pattern_are_counted():
    labels = np.array([0, 1, 0, 0])  # head 0 the same on both pictures, head 1 not
    one = Grouping("autoencoder", np.zeros((4, 2)), 0.1, of_labels(labels), np.zeros((2, 8, 8)))
    found = PatternSummary(
        one, one, np.array([0, 0, 1, 1]), np.zeros(4, int), np.array([0, 1, 0, 1]), 8
    )
    assert (
        said(found, "heads")
        == "1 of 2 heads keep one pattern on all 2 pictures (1.2 by chance, by the sizes of the patterns)."
    )
